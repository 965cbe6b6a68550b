using System.Collections.Immutable;

namespace FlexLLM.Scheduling;

/// <summary>A sequence's place in the one order: earlier first, ties by id.</summary>
internal readonly record struct OrderKey(long Ticks, long Id, int Index) : IComparable<OrderKey>
{
    public int CompareTo(OrderKey other) => Ticks != other.Ticks ? Ticks.CompareTo(other.Ticks) : Id.CompareTo(other.Id);
}

/// <summary>What stage 1 decided for a sequence.</summary>
[Flags]
internal enum PlanMarks
{
    /// <summary>Nothing.</summary>
    None = 0,

    /// <summary>It gives up its blocks.</summary>
    Preempted = 1,

    /// <summary>It runs from this step on.</summary>
    Admitted = 2,

    /// <summary>Waiting, and its turn has come, whether it was admitted or not.</summary>
    Considered = 4,
}

/// <summary>
/// Buffers of the planner, kept from step to step so that planning allocates nothing but the plan. No value in it outlives a call:
/// plans are the same with a new one. One planner at a time.
/// </summary>
internal sealed class PlannerScratch
{
    /// <summary>All sequences in order.</summary>
    public OrderKey[] Order { get; private set; } = [];

    /// <summary>By index in the snapshot.</summary>
    public PlanMarks[] Marks { get; private set; } = [];

    /// <summary>By index in the snapshot: tokens that are left after the step.</summary>
    public int[] TokensLeft { get; private set; } = [];

    /// <summary>By tenant: service per weight, with what the plan gives out.</summary>
    public double[] TenantServed { get; private set; } = [];

    /// <summary>By tenant: when it last got a place, in this plan too.</summary>
    public TimeSpan[] TenantAdmitted { get; private set; } = [];

    /// <summary>Sequences with a prompt to compute, in order.</summary>
    public List<PromptLeft> Prompts { get; } = [];

    /// <summary>Indices of jobs that have work, in the order of their turns.</summary>
    public List<int> Jobs { get; } = [];

    public ImmutableArray<InferenceWork>.Builder Work { get; } = ImmutableArray.CreateBuilder<InferenceWork>();

    public ImmutableArray<SequenceId>.Builder Ids { get; } = ImmutableArray.CreateBuilder<SequenceId>();

    public ImmutableArray<ForwardWindow>.Builder Forward { get; } = ImmutableArray.CreateBuilder<ForwardWindow>();

    public ImmutableArray<BackwardWindow>.Builder Backward { get; } = ImmutableArray.CreateBuilder<BackwardWindow>();

    /// <summary>Empties it for a snapshot of this size.</summary>
    public void Reset(EngineSnapshot now)
    {
        int count = now.Sequences.Length;
        if (Order.Length < count)
        {
            int length = Math.Max(count, 2 * Order.Length);
            (Order, Marks, TokensLeft) = (new OrderKey[length], new PlanMarks[length], new int[length]);
        }

        if (TenantServed.Length < now.Tenants.Length)
        {
            int length = Math.Max(now.Tenants.Length, 2 * TenantServed.Length);
            (TenantServed, TenantAdmitted) = (new double[length], new TimeSpan[length]);
        }

        for (int i = 0; i < now.Tenants.Length; i++)
        {
            (TenantServed[i], TenantAdmitted[i]) = (now.Tenants[i].Served, now.Tenants[i].LastAdmission);
        }

        Array.Clear(Marks, 0, count);
        Prompts.Clear();
        Jobs.Clear();
        Work.Clear();
        Ids.Clear();
        Forward.Clear();
        Backward.Clear();
    }
}
