namespace FlexLLM.Graph.Parallelization;

/// <summary>Names of plans found, by what they do. The search knows nothing of this table.</summary>
internal static class PlanNames
{
    // Those of paper.md b.4 and b.5; R4 has three variants there and C6 is not in it.
    private static readonly Dictionary<string, string> Known = new(StringComparer.Ordinal)
    {
        ["replicate (1) (4)"] = "C1",
        ["partition(hidden) (2) all-reduce (4)"] = "C2",
        ["partition(tokens) (3) (3) all-to-all(tokens,hidden)"] = "C3",
        ["partition(tokens) (3) all-gather(tokens) (4)"] = "C4",
        ["replicate (4) (2) reduce-scatter(hidden)"] = "C5",
        ["replicate (4) all-gather(hidden) (4)"] = "C6",
        ["(2) (5)"] = "R1",
        ["(2) all-reduce (1)"] = "R2",
        ["(2) reduce-scatter(hidden) (2)"] = "R3",
        ["all-gather(hidden) (1) (1)"] = "R4a",
        ["all-gather(hidden) (1) (4) all-gather(hidden)"] = "R4b",
        ["all-gather(hidden) (4) (2)"] = "R4c",
        ["all-to-all(hidden,tokens) (3) (3) all-gather(tokens)"] = "R5",
    };

    /// <summary>
    /// The paper's name, else tap and cases as in "C(2,3)". Plans that differ only in where an elementwise operator
    /// stands share a name and are numbered.
    /// </summary>
    public static string[] Of(IReadOnlyList<BypassPlan> plans)
    {
        Dictionary<string, int> uses = new(StringComparer.Ordinal);
        return [.. plans.Select(plan =>
        {
            string name = Of(plan);
            int use = uses[name] = uses.GetValueOrDefault(name) + 1;
            return use == 1 ? name : $"{name}#{use}";
        })];
    }

    private static string Of(BypassPlan plan)
    {
        IEnumerable<int> cases = plan.Forward.OfType<ComputeStep>().Select(step => step.Case.Number).Where(n => n > 0);
        IEnumerable<string> steps = plan.Forward
            .Where(step => step is not ComputeStep { Case.Number: 0 })
            .Select(step => step is MoveStep move ? move.Operator.Label : $"({((ComputeStep)step).Case.Number})");
        return Known.TryGetValue(string.Join(' ', steps), out string? name)
            ? name
            : $"{plan.Tap.Symbol}({string.Join(',', cases)})";
    }
}
