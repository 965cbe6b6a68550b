using FlexLLM.Engine;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Tests.Scheduling;

/// <summary>
/// Requests that never end: whenever fewer than so many wait, more come. One victim comes among them. Every step takes 10 ms.
/// </summary>
internal sealed class FloodRun
{
    public const int Backlog = 12;
    public const int PromptMax = 64;
    public const int AnswerMax = 20;

    private const string VictimsTenant = "victim";

    private static readonly TimeSpan StepTime = TimeSpan.FromMilliseconds(10);

    private readonly PlannedRequests _requests;
    private SeededRandom _random;
    private TimeSpan _now = TimeSpan.Zero;

    /// <param name="limits">Of the plans.</param>
    /// <param name="blocks">Of the KV cache.</param>
    /// <param name="seed">Of all lengths.</param>
    /// <param name="hidesTenants">
    /// Everybody is one tenant's to the planner: a control, and what keeps tenants out of other properties.
    /// </param>
    public FloodRun(StepLimits limits, int blocks, ulong seed, bool hidesTenants)
    {
        var table = new TenantTable(new Dictionary<string, double> { ["t0"] = 1.0, ["t1"] = 3.0 });
        _requests = new PlannedRequests(limits, blocks, table, Count) { HidesTenants = hidesTenants };
        _random = new SeededRandom(seed);
    }

    /// <summary>Requests of each flooding tenant that wait.</summary>
    public int Flooding { get; init; } = Backlog;

    /// <summary>Tenants that flood, of weights 1 and 3.</summary>
    public int Tenants { get; init; } = 1;

    /// <summary>What is special about a flooding request.</summary>
    public Func<SequenceSnapshot, SequenceSnapshot> Flood { get; init; } = s => s;

    /// <summary>Tokens that the flooding tenants had, prompts and twice the answers.</summary>
    public double[] Served { get; } = new double[2];

    /// <summary>Steps that the last token came after a victim's prompt of so many, or null where that took more than so many.</summary>
    public int? StepsToAnswer(int promptTokens, int stepsMax)
    {
        Run(steps: 50);
        PlannedRequest victim = _requests.Add(VictimsTenant, PlannedRequests.Prompt(promptTokens, AnswerMax), AnswerMax, _now);
        for (int step = 1; step <= stepsMax; step++)
        {
            Run(steps: 1);
            if (!_requests.Live.Contains(victim))
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
            _requests.Compute(_requests.Plan(_now), _now);
        }
    }

    private void TopUp(string tenant)
    {
        for (int waiting = _requests.Live.Count(r => r.Tenant.Name == tenant && r.IsWaiting); waiting < Flooding; waiting++)
        {
            SequenceSnapshot prompt = PlannedRequests.Prompt(_random.Next(PromptMax * 3 / 4, PromptMax) + 1, AnswerMax);
            _requests.Add(tenant, Flood(prompt), _random.Next(1, AnswerMax + 1), _now);
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
