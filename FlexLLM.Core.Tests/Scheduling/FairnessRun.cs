using FlexLLM.Engine;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Tests.Scheduling;

/// <summary>
/// Two tenants, one of which asks for ten times as much, through the scheduler with the engine's own accounts: how far their service
/// drifts apart while both wait. Every step takes 10 ms. Throws where the machine idles beside waiting requests.
/// </summary>
internal static class FairnessRun
{
    private const int Places = 8;
    private const int PromptMax = 200;
    private const int AnswerMax = 60;

    /// <summary>
    /// max(prompt, 2 x tokens that run together) of Sheng et al., OSDI'24, theorem 4.4, times two for the interval.
    /// </summary>
    public const double Bound = 2.0 * 2.0 * Places * AnswerMax;

    private sealed class Request
    {
        public required SequenceSnapshot Seen { get; set; }

        public required Tenant Tenant { get; init; }

        public required int Answer { get; init; }
    }

    /// <summary>The widest difference of the two counters while both had requests waiting.</summary>
    public static double GapMax(int seed, bool isFair)
    {
        var random = new SeededRandom((ulong)seed);
        var table = new TenantTable(new Dictionary<string, double>());
        var scratch = new PlannerScratch();
        var live = new List<Request>();
        var limits = new StepLimits { TokensPerStepMax = 256, SequencesMax = Places };
        LatencyModel latency = LatencyModel.Default with { Correction = 0.1 };
        double gap = 0.0;
        for (int step = 1; step <= 3_000; step++)
        {
            TimeSpan now = TimeSpan.FromMilliseconds(10 * step);
            for (int tenant = 0; tenant < 2; tenant++)
            {
                if (random.NextDouble() < (tenant == 0 ? 1.0 : 0.25))
                {
                    live.Add(Arrive(ref random, table, tenant, (2 * step) + tenant, now));
                }
            }

            Tenant[] backlogged = [.. live.Where(r => r.Seen.Phase == SequencePhase.Waiting).Select(r => r.Tenant).Distinct()];
            if (backlogged.Length == 2)
            {
                gap = Math.Max(gap, Math.Abs(backlogged[0].Served - backlogged[1].Served));
            }

            Step(live, table, now, limits, latency, scratch, isFair);
        }

        return gap;
    }

    private static Request Arrive(ref SeededRandom random, TenantTable table, int tenant, long id, TimeSpan now)
    {
        int prompt = random.Next(1, PromptMax + 1);
        return new Request
        {
            Tenant = table.Enter($"t{tenant}"),
            Answer = random.Next(1, AnswerMax + 1),
            Seen = new SequenceSnapshot
            {
                Id = new SequenceId(id),
                Phase = SequencePhase.Waiting,
                TokensTotal = prompt,
                TokensMax = prompt + AnswerMax,
                ServiceDue = prompt,
                ArrivalTime = now,
                TpotTarget = TimeSpan.FromSeconds(1),
                TtftTarget = TimeSpan.FromSeconds(60),
            },
        };
    }

    private static void Step(
        List<Request> live, TenantTable table, TimeSpan now, StepLimits limits, in LatencyModel latency, PlannerScratch scratch,
        bool isFair)
    {
        const int Blocks = 100_000;
        var snapshot = new EngineSnapshot
        {
            Now = now,
            Sequences = [.. live.Select(r => r.Seen with { Tenant = r.Tenant.Slot })],
            Tenants = isFair ? table.Snapshot() : [],
            FreeBlocks = Blocks - live.Sum(r => r.Seen.BlocksHeld),
            TotalBlocks = Blocks,
            TokensPerBlock = 16,
        };
        StepPlan plan = HybridTokenScheduler.Plan(snapshot, limits, latency, scratch);
        var byId = live.ToDictionary(r => r.Seen.Id);
        foreach (SequenceId id in plan.Admissions)
        {
            Request r = byId[id];
            table.Admit(r.Tenant, r.Seen.ServiceDue, now);
            r.Seen = r.Seen with { Phase = SequencePhase.Running, ServiceDue = 0 };
        }

        int running = live.Count(r => r.Seen.Phase == SequencePhase.Running);
        bool isFull = running == Places || running == live.Count || plan.Features.InferenceRows == limits.TokensPerStepMax;
        Check.That(isFull, "a place stays free beside waiting requests");
        foreach (InferenceWork work in plan.Inference)
        {
            Request r = byId[work.Id];
            int computed = work.ContextLength + work.Tokens;
            r.Seen = r.Seen with { TokensComputed = computed, BlocksHeld = (computed + 15) / 16 };
            if (r.Seen.TokensLeft > 0)
            {
                continue;
            }

            TenantTable.Generated(r.Tenant);
            int generated = r.Seen.TokensGenerated + 1;
            r.Seen = r.Seen with
            {
                TokensTotal = computed + 1,
                TokensGenerated = generated,
                FirstTokenTime = r.Seen.FirstTokenTime ?? now,
            };
            if (generated == r.Answer)
            {
                live.Remove(r);
                table.Leave(r.Tenant, waiting: false);
            }
        }
    }
}
