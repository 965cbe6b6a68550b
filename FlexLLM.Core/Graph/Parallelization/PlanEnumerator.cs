namespace FlexLLM.Graph.Parallelization;

/// <summary>
/// The search of paper.md b.6: every assignment of legal cases to the operators of a bypass, with the shortest legal chain of
/// parallel operators on each edge whose two layouts differ. No operator runs on a whole tensor: inside of a plan one rank alone
/// would have it, and two operators would lead there and back where one collective does.
/// </summary>
internal sealed class PlanEnumerator
{
    private readonly Bypass _bypass;
    private readonly BypassTap _tap;
    private readonly int _ranks;
    private readonly List<BypassPlan> _plans = [];

    private PlanEnumerator(Bypass bypass, BypassTap tap, int ranks) => (_bypass, _tap, _ranks) = (bypass, tap, ranks);

    /// <summary>All plans that the rules allow, in the order of their cases. At most 5 to the number of operators.</summary>
    public static IReadOnlyList<BypassPlan> Enumerate(Bypass bypass, BypassTap tap, int ranks, SearchRules rules)
    {
        var search = new PlanEnumerator(bypass, tap, ranks);
        search.Extend(0, []);
        return [.. search._plans.Where(rules.Allow)];
    }

    /// <summary>
    /// The fewest operators that lead from one layout to another through layouts that <paramref name="isPossible"/> accepts;
    /// empty if the two are equal, null if no chain does. Breadth first, in the order of the table.
    /// </summary>
    public static IReadOnlyList<ParallelOperator>? ShortestChain(
        TensorLayout from, TensorLayout to, IReadOnlyList<ParallelOperator> operators, Func<TensorLayout, bool> isPossible)
    {
        Dictionary<TensorLayout, ParallelOperator[]> chains = new() { [from] = [] };
        Queue<TensorLayout> frontier = new([from]);
        while (!chains.ContainsKey(to) && frontier.TryDequeue(out TensorLayout at))
        {
            foreach (ParallelOperator op in operators.Where(o => o.From == at && isPossible(o.To)))
            {
                if (chains.TryAdd(op.To, [.. chains[at], op]))
                {
                    frontier.Enqueue(op.To);
                }
            }
        }

        return chains.GetValueOrDefault(to);
    }

    private void Extend(int index, PlanStep[] steps)
    {
        TensorLayout at = steps.Length == 0 ? _tap.Input : steps[^1].To;
        if (index == _bypass.Operators.Count)
        {
            Finish(at, steps);
            return;
        }

        BypassOperator op = _bypass.Operators[index];
        foreach (OperatorCase candidate in op.Cases)
        {
            bool isPossible = candidate.Input != TensorLayout.Whole
                && Divides(candidate.Input, op.InputWidth)
                && Divides(candidate.Output, op.OutputWidth);
            if (isPossible && Moves(at, candidate.Input, op.InputWidth, isTap: index == 0, isAdd: false) is { } moves)
            {
                Extend(index + 1, [.. steps, .. moves, new ComputeStep(op, candidate)]);
            }
        }
    }

    /// <summary>Ends at the add point that is nearest to the result; the earlier one where two are equally near.</summary>
    private void Finish(TensorLayout at, PlanStep[] steps)
    {
        var nearest = _tap.AddPoints
            .Select(add => (Add: add, Moves: Moves(at, add.Layout, _bypass.OutputWidth, isTap: false, isAdd: true)))
            .Where(end => end.Moves is not null)
            .OrderBy(end => end.Moves!.Length)
            .FirstOrDefault();
        if (nearest.Moves is not null)
        {
            _plans.Add(new BypassPlan(_tap, nearest.Add, _ranks, [.. steps, .. nearest.Moves]));
        }
    }

    private MoveStep[]? Moves(TensorLayout from, TensorLayout to, int width, bool isTap, bool isAdd)
    {
        IReadOnlyList<ParallelOperator>? chain =
            ShortestChain(from, to, ParallelOperator.All, layout => Divides(layout, width));
        return chain is null
            ? null
            : [.. chain.Select((op, i) => new MoveStep(op, width, isTap && i == 0 && _tap.InputEverywhere, isTap || isAdd))];
    }

    /// <summary>Columns are split evenly or not at all; ragged token slices are fine.</summary>
    private bool Divides(TensorLayout layout, int width) => layout != TensorLayout.SplitColumns || width % _ranks == 0;
}
