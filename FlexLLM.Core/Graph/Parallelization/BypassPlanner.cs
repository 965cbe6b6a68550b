namespace FlexLLM.Graph.Parallelization;

/// <summary>A plan with its price. A dominated plan names one that is no worse in anything; it is never chosen.</summary>
internal sealed record PlanEntry(
    string Name, BypassPlan Plan, PlanDemand Demand, PlanCost Cost, string? DominatedBy, bool Fits);

/// <summary>All plans of one bypass on one tap, the paper's first, and the cheapest that fits (null if none does).</summary>
internal sealed record Planning(
    BypassTap Tap, Bypass Bypass, PlanTokens Tokens, int Ranks, IReadOnlyList<PlanEntry> Plans, PlanEntry? Choice);

/// <summary>
/// Dependent parallelization (paper.md b): the backbone's plan is fixed, the bypass takes the cheapest legal plan that begins
/// and ends in the layouts the backbone has at the tap and the add.
/// </summary>
internal static class BypassPlanner
{
    private const int OperatorsMax = 8;

    /// <summary>
    /// Enumerates, prices and picks. The widths of X and of the sum must be multiples of <paramref name="ranks"/> (the backbone
    /// splits them already) and equal on a serial tap; an inner width that is no multiple merely has fewer plans.
    /// </summary>
    public static Planning Plan(
        BypassTap tap, Bypass bypass, PlanTokens tokens, int ranks, MachineModel machine, SearchRules? rules = null)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(ranks, 2);
        ArgumentOutOfRangeException.ThrowIfNegativeOrZero(tokens.PerBatch);
        ArgumentOutOfRangeException.ThrowIfNegative(tokens.PerStep);
        ArgumentOutOfRangeException.ThrowIfGreaterThan(bypass.Operators.Count, OperatorsMax);
        ArgumentOutOfRangeException.ThrowIfNotEqual(bypass.InputWidth % ranks, 0);
        ArgumentOutOfRangeException.ThrowIfNotEqual(bypass.OutputWidth % ranks, 0);
        if (tap.IsSerial)
        {
            ArgumentOutOfRangeException.ThrowIfNotEqual(bypass.InputWidth, bypass.OutputWidth);
        }

        machine.Validate();

        IReadOnlyList<BypassPlan> found = PlanEnumerator.Enumerate(bypass, tap, ranks, rules ?? SearchRules.Paper);
        PlanEntry[] plans = [.. found
            .Zip(PlanNames.Of(found), (plan, name) => Price(name, plan, tokens, machine))
            .OrderBy(entry => entry.Name.Contains('(', StringComparison.Ordinal))
            .ThenBy(entry => entry.Name, StringComparer.Ordinal)];
        plans = NameDominators(plans, tokens.Training);
        PlanEntry? choice = plans.Where(entry => entry.DominatedBy is null && entry.Fits).MinBy(entry => entry.Cost.TotalSeconds);
        return new Planning(tap, bypass, tokens, ranks, plans, choice);
    }

    private static PlanEntry Price(string name, BypassPlan plan, PlanTokens tokens, MachineModel machine)
    {
        PlanDemand demand = PlanDemand.Of(plan);
        PlanCost cost = PlanCost.Of(demand, tokens, plan.Ranks, machine);
        return new PlanEntry(name, plan, demand, cost, null, cost.MemoryBytes <= machine.MemoryBytes);
    }

    /// <summary>Dominance is a strict order, so a dominated plan has a dominator that is not dominated itself.</summary>
    private static PlanEntry[] NameDominators(PlanEntry[] plans, bool training)
    {
        PlanEntry[] best = [.. plans.Where(p => !plans.Any(q => q.Demand.Dominates(p.Demand, training)))];
        return [.. plans.Select(p => p with
        {
            DominatedBy = best.FirstOrDefault(q => q.Demand.Dominates(p.Demand, training))?.Name,
        })];
    }
}
