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
    private const int BlocksMany = 100_000;

    /// <summary>
    /// max(prompt, 2 x tokens that run together) of Sheng et al., OSDI'24, theorem 4.4, times two for the interval.
    /// </summary>
    public const double Bound = 2.0 * 2.0 * Places * AnswerMax;

    /// <summary>The widest difference of the two counters while both had requests waiting.</summary>
    public static double GapMax(int seed, bool isFair)
    {
        var random = new SeededRandom((ulong)seed);
        var limits = new StepLimits { TokensPerStepMax = 256, SequencesMax = Places };
        var table = new TenantTable(new Dictionary<string, double>());
        var requests = new PlannedRequests(limits, BlocksMany, table) { HidesTenants = !isFair };
        double gap = 0.0;
        for (int step = 1; step <= 3_000; step++)
        {
            TimeSpan now = TimeSpan.FromMilliseconds(10 * step);
            for (int tenant = 0; tenant < 2; tenant++)
            {
                if (random.NextDouble() < (tenant == 0 ? 1.0 : 0.25))
                {
                    SequenceSnapshot prompt = PlannedRequests.Prompt(random.Next(1, PromptMax + 1), AnswerMax);
                    requests.Add($"t{tenant}", prompt, random.Next(1, AnswerMax + 1), now);
                }
            }

            Tenant[] backlogged = [.. requests.Live.Where(r => r.IsWaiting).Select(r => r.Tenant).Distinct()];
            if (backlogged.Length == 2)
            {
                gap = Math.Max(gap, Math.Abs(backlogged[0].Served - backlogged[1].Served));
            }

            StepPlan plan = requests.Plan(now);
            int running = requests.Live.Count(r => !r.IsWaiting);
            bool isFull = running == Places || running == requests.Live.Count || plan.Features.InferenceRows == limits.TokensPerStepMax;
            Check.That(isFull, "a place stays free beside waiting requests");
            requests.Compute(plan, now);
        }

        return gap;
    }
}
