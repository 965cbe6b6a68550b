using FlexLLM.Engine;
using FlexLLM.Scheduling;

namespace FlexLLM.Tests.Scheduling;

/// <summary>A request as the scheduler sees it, whose it is, and how many tokens its answer has.</summary>
internal sealed class PlannedRequest(Tenant tenant, int answer)
{
    public Tenant Tenant => tenant;

    public int Answer => answer;

    public required SequenceSnapshot Seen { get; set; }

    public bool IsWaiting => Seen.Phase == SequencePhase.Waiting;
}

/// <summary>
/// Requests from their arrival to their last token, through the scheduler with the engine's own accounts of tenants, on a machine that
/// does what is planned.
/// </summary>
/// <param name="limits">Of the plans.</param>
/// <param name="blocks">Of the KV cache, none of them shared.</param>
/// <param name="table">The accounts.</param>
/// <param name="onServed">Is told whom a plan served, and with how many tokens: prompts on admission, generated ones twice.</param>
internal sealed class PlannedRequests(StepLimits limits, int blocks, TenantTable table, Action<Tenant, double>? onServed = null)
{
    private const int TokensPerBlock = 16;

    private static readonly LatencyModel Latency = LatencyModel.Default with { Correction = 0.1 };

    private readonly PlannerScratch _scratch = new();
    private readonly Dictionary<SequenceId, PlannedRequest> _live = [];
    private long _nextId = 1;

    /// <summary>Everybody is one tenant's to the planner.</summary>
    public bool HidesTenants { get; init; }

    public IReadOnlyCollection<PlannedRequest> Live => _live.Values;

    /// <summary>A prompt that waits.</summary>
    public static SequenceSnapshot Prompt(int tokens, int answerMax) => new()
    {
        Id = new SequenceId(0),
        Phase = SequencePhase.Waiting,
        TokensTotal = tokens,
        TokensMax = tokens + answerMax,
        ServiceDue = tokens,
        ArrivalTime = TimeSpan.Zero,
        TpotTarget = TimeSpan.FromSeconds(1),
        TtftTarget = TimeSpan.FromSeconds(60),
    };

    /// <summary>A request comes.</summary>
    public PlannedRequest Add(string tenant, SequenceSnapshot prompt, int answer, TimeSpan now)
    {
        SequenceSnapshot seen = prompt with { Id = new SequenceId(_nextId++), ArrivalTime = now };
        var request = new PlannedRequest(table.Enter(tenant), answer) { Seen = seen };
        _live.Add(seen.Id, request);
        return request;
    }

    /// <summary>Plans a step, and takes and gives places as it says.</summary>
    public StepPlan Plan(TimeSpan now)
    {
        var snapshot = new EngineSnapshot
        {
            Now = now,
            Sequences = [.. Live.Select(r => r.Seen with { Tenant = r.Tenant.Slot })],
            Tenants = HidesTenants ? [] : table.Snapshot(),
            FreeBlocks = blocks - Live.Where(r => !r.IsWaiting).Sum(r => r.Seen.BlocksHeld),
            TotalBlocks = blocks,
            TokensPerBlock = TokensPerBlock,
        };
        StepPlan plan = HybridTokenScheduler.Plan(snapshot, limits, Latency, _scratch);
        foreach (SequenceId id in plan.Preemptions)
        {
            PlannedRequest r = _live[id];
            r.Seen = r.Seen with { Phase = SequencePhase.Waiting, TokensComputed = 0, BlocksHeld = 0 };
            table.Wait(r.Tenant);
        }

        foreach (SequenceId id in plan.Admissions)
        {
            PlannedRequest r = _live[id];
            table.Admit(r.Tenant, r.Seen.ServiceDue, now);
            onServed?.Invoke(r.Tenant, r.Seen.ServiceDue);
            r.Seen = r.Seen with { Phase = SequencePhase.Running, ServiceDue = 0 };
        }

        return plan;
    }

    /// <summary>Does what was planned; who has all tokens goes.</summary>
    public void Compute(StepPlan plan, TimeSpan now)
    {
        foreach (InferenceWork work in plan.Inference)
        {
            Compute(_live[work.Id], work.ContextLength + work.Tokens, now);
        }
    }

    private void Compute(PlannedRequest r, int computed, TimeSpan now)
    {
        int held = (computed + TokensPerBlock - 1) / TokensPerBlock;
        r.Seen = r.Seen with { TokensComputed = computed, BlocksHeld = Math.Max(held, r.Seen.BlocksHeld) };
        if (r.Seen.TokensLeft > 0)
        {
            return;
        }

        TenantTable.Generated(r.Tenant);
        onServed?.Invoke(r.Tenant, 2.0);
        r.Seen = r.Seen with
        {
            TokensTotal = computed + 1,
            TokensGenerated = r.Seen.TokensGenerated + 1,
            FirstTokenTime = r.Seen.FirstTokenTime ?? now,
        };
        if (r.Seen.TokensGenerated == r.Answer)
        {
            _live.Remove(r.Seen.Id);
            table.Leave(r.Tenant, waiting: false);
        }
    }
}
