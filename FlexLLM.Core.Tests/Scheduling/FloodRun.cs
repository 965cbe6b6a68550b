using FlexLLM.Engine;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Tests.Scheduling;

/// <summary>
/// Requests that never end: whenever fewer than so many wait, more come. One victim comes among them. Plans are made with the
/// engine's own accounts of tenants; every step takes 10 ms.
/// </summary>
internal sealed class FloodRun(StepLimits limits, int blocks, ulong seed)
{
    public const int Backlog = 12;
    public const int PromptMax = 64;
    public const int AnswerMax = 20;

    private const int TokensPerBlock = 16;
    private const string VictimsTenant = "victim";

    private static readonly TimeSpan StepTime = TimeSpan.FromMilliseconds(10);
    private static readonly LatencyModel Latency = LatencyModel.Default with { Correction = 0.1 };

    private readonly TenantTable _table = new(new Dictionary<string, double> { ["t0"] = 1.0, ["t1"] = 3.0 });
    private readonly PlannerScratch _scratch = new();
    private readonly Dictionary<SequenceId, Request> _live = [];
    private SeededRandom _random = new(seed);
    private TimeSpan _now = TimeSpan.Zero;
    private long _nextId = 1;

    private sealed record Request(Tenant Tenant, int Answer)
    {
        public required SequenceSnapshot Seen { get; set; }
    }

    /// <summary>Requests of each flooding tenant that wait.</summary>
    public int Flooding { get; init; } = Backlog;

    /// <summary>Tenants that flood, of weights 1 and 3.</summary>
    public int Tenants { get; init; } = 1;

    /// <summary>Everybody is one tenant's to the planner: a control, and what keeps tenants out of other properties.</summary>
    public bool HidesTenants { get; init; }

    /// <summary>What is special about a flooding request.</summary>
    public Func<SequenceSnapshot, SequenceSnapshot> Flood { get; init; } = s => s;

    /// <summary>Tokens that the flooding tenants had, prompts and twice the answers.</summary>
    public double[] Served { get; } = new double[2];

    /// <summary>Steps that the victim's last token came after it did, or null where that took more than so many.</summary>
    public int? StepsToAnswer(SequenceSnapshot victim, int stepsMax)
    {
        Run(steps: 50);
        SequenceSnapshot late = victim with { Id = new SequenceId(_nextId++), ArrivalTime = _now };
        _live.Add(late.Id, new Request(_table.Enter(VictimsTenant), AnswerMax) { Seen = late });
        for (int step = 1; step <= stepsMax; step++)
        {
            Run(steps: 1);
            if (!_live.ContainsKey(late.Id))
            {
                return step;
            }
        }

        return null;
    }

    public void Run(int steps)
    {
        for (int i = 0; i < steps; i++)
        {
            for (int tenant = 0; tenant < Tenants; tenant++)
            {
                TopUp($"t{tenant}");
            }

            _now += StepTime;
            Step();
        }
    }

    /// <summary>A prompt that waits.</summary>
    public static SequenceSnapshot Prompt(int tokens) => new()
    {
        Id = new SequenceId(0),
        Phase = SequencePhase.Waiting,
        TokensTotal = tokens,
        TokensMax = tokens + AnswerMax,
        ServiceDue = tokens,
        ArrivalTime = TimeSpan.Zero,
        TpotTarget = TimeSpan.FromSeconds(1),
        TtftTarget = TimeSpan.FromSeconds(60),
    };

    private void TopUp(string tenant)
    {
        int waiting = _live.Values.Count(r => r.Tenant.Name == tenant && r.Seen.Phase == SequencePhase.Waiting);
        for (; waiting < Flooding; waiting++)
        {
            SequenceSnapshot next = Flood(Prompt(_random.Next(PromptMax * 3 / 4, PromptMax) + 1));
            next = next with { Id = new SequenceId(_nextId++), ArrivalTime = _now };
            _live.Add(next.Id, new Request(_table.Enter(tenant), _random.Next(1, AnswerMax + 1)) { Seen = next });
        }
    }

    private void Step()
    {
        int taken = _live.Values.Where(r => r.Seen.Phase == SequencePhase.Running).Sum(r => r.Seen.BlocksHeld);
        var snapshot = new EngineSnapshot
        {
            Now = _now,
            Sequences = [.. _live.Values.Select(r => r.Seen with { Tenant = r.Tenant.Slot })],
            Tenants = HidesTenants ? [] : _table.Snapshot(),
            FreeBlocks = blocks - taken,
            TotalBlocks = blocks,
            TokensPerBlock = TokensPerBlock,
        };
        StepPlan plan = HybridTokenScheduler.Plan(snapshot, limits, Latency, _scratch);
        foreach (SequenceId id in plan.Preemptions)
        {
            Request r = _live[id];
            r.Seen = r.Seen with { Phase = SequencePhase.Waiting, TokensComputed = 0, BlocksHeld = 0 };
            _table.Wait(r.Tenant);
        }

        foreach (SequenceId id in plan.Admissions)
        {
            Request r = _live[id];
            _table.Admit(r.Tenant, r.Seen.ServiceDue, _now);
            Count(r.Tenant, r.Seen.ServiceDue);
            r.Seen = r.Seen with { Phase = SequencePhase.Running, ServiceDue = 0 };
        }

        foreach (InferenceWork work in plan.Inference)
        {
            Compute(_live[work.Id], work.ContextLength + work.Tokens);
        }
    }

    private void Compute(Request r, int computed)
    {
        int held = (computed + TokensPerBlock - 1) / TokensPerBlock;
        r.Seen = r.Seen with { TokensComputed = computed, BlocksHeld = Math.Max(held, r.Seen.BlocksHeld) };
        if (r.Seen.TokensLeft > 0)
        {
            return;
        }

        TenantTable.Generated(r.Tenant);
        Count(r.Tenant, 2.0);
        int generated = r.Seen.TokensGenerated + 1;
        r.Seen = r.Seen with
        {
            TokensTotal = computed + 1,
            TokensGenerated = generated,
            FirstTokenTime = r.Seen.FirstTokenTime ?? _now,
        };
        if (generated == r.Answer)
        {
            _live.Remove(r.Seen.Id);
            _table.Leave(r.Tenant, waiting: false);
        }
    }

    private void Count(Tenant tenant, double tokens)
    {
        if (tenant.Name != VictimsTenant)
        {
            Served[tenant.Name[1] - '0'] += tokens;
        }
    }
}
