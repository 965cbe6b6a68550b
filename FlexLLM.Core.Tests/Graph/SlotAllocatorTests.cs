using FlexLLM.Graph;
using FlexLLM.Tests.Support;
using FsCheck;
using FsCheck.Fluent;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>Arenas of random programs: what is alive at the same time never shares space, and space is not wasted.</summary>
[TestFixture]
internal sealed class SlotAllocatorTests
{
    private static readonly Config Many = Repeatable.Many(seed: 7, count: 400);

    /// <summary>A node: which values it reads, how wide its results are, and whether it works in place or renames.</summary>
    private static Arbitrary<(int First, int Second, int Width, Placing Placing)[]> Programs { get; } = (
        from first in Gen.Choose(0, 10_000)
        from second in Gen.Choose(0, 10_000)
        from width in Gen.Choose(1, 70)
        from placing in Gen.Elements(Placing.Fresh, Placing.Fresh, Placing.InPlace, Placing.Alias, Placing.TwoResults)
        select (first, second, width, placing)).ArrayOf().ToArbitrary();

    private enum Placing
    {
        Fresh,
        InPlace,
        Alias,
        TwoResults,
    }

    [Test]
    public void Take_AnyProgram_NeverOverlapsWhatIsAlive() =>
        FsCheck.Check.One(Many, Prop.ForAll(Programs, steps => Holds(steps, forgets: false)));

    [Test]
    public void Take_Control_AllocatorThatForgetsTheLastReader_IsFound() =>
        Assert.That(() => FsCheck.Check.One(Many, Prop.ForAll(Programs, steps => Holds(steps, forgets: true))), Throws.Exception);

    [Test]
    public void Arena_OfChainedValues_HoldsTwo()
    {
        ParallelGraph graph = Graph([.. Enumerable.Repeat((int.MaxValue, int.MaxValue, 20, Placing.Fresh), 9)]);
        var slots = new SlotAllocator(graph, graph.Nodes);
        slots.Place(0, new BufferRef(BufferKind.Tap));
        foreach (GraphNode node in graph.Nodes)
        {
            slots.Take(node.Outputs[0], 20);
            slots.Release(node, node.Id);
        }

        Assert.That(slots.Layout.Columns, Is.EqualTo(2 * ArenaLayout.Padded(20)));
        Assert.That(slots.Layout.Slots, Has.Count.EqualTo(2), "a slot that comes again is the same one");
    }

    [Test]
    public void Arena_OfEveryJob_IsLessThanItsValues(
        [ValueSource(typeof(PeftMethods), nameof(PeftMethods.All))] PeftConfig method, [Values] ModelArchitecture architecture)
    {
        ModelConfig config = TinyModel.ConfigOf(architecture, 3);
        TrainingProgram program = TrainingGraphs.Compile(config, TrainingGraphs.Of(config, method));
        long made = program.Graph.Nodes.Where(n => n.IsBackward && n.Layer >= 0).SelectMany(n => n.Outputs)
            .Select(o => program.Graph.Values[o]).Where(v => v.Kind != ValueKind.WeightGradient)
            .Sum(v => (long)ArenaLayout.Padded(v.Columns));
        Assert.That(program.Arena.Columns, Is.Positive.And.LessThan(made / config.LayerCount), "layers use the same space");
        Assert.That(program.Arena.Slots.Select(s => s.Offset % ArenaLayout.Alignment), Is.All.Zero);
        Assert.That(program.Arena.Slots.Max(s => s.Offset + ArenaLayout.Padded(s.Columns)), Is.EqualTo(program.Arena.Columns));
    }

    private static bool Holds((int First, int Second, int Width, Placing Placing)[] steps, bool forgets)
    {
        ParallelGraph graph = Graph(steps);
        int[] lastRead = new int[graph.Values.Count];
        Array.Fill(lastRead, -1);
        foreach (GraphNode node in graph.Nodes)
        {
            Array.ForEach(node.Inputs, i => lastRead[i] = node.Id);
        }

        // Values in one group are names of the same rows.
        int[] group = [.. Enumerable.Range(0, graph.Values.Count)];
        var slots = new SlotAllocator(graph, [.. graph.Nodes.Take(graph.Nodes.Count - (forgets ? 1 : 0))]);
        slots.Place(0, new BufferRef(BufferKind.Tap));
        var made = new List<int>();
        long taken = 0;
        long peak = 0;
        foreach (GraphNode node in graph.Nodes)
        {
            Placing placing = steps[node.Id].Placing;
            foreach (int output in node.Outputs)
            {
                if (placing == Placing.Alias)
                {
                    slots.Place(output, slots[node.Inputs[0]]);
                    group[output] = group[node.Inputs[0]];
                }
                else if (placing != Placing.InPlace || slots[node.Inputs[0]].Kind != BufferKind.Slot ||
                    !slots.TryInherit(output, node.Inputs[0], node.Id))
                {
                    slots.Take(output, graph.Values[output].Columns);
                    taken += ArenaLayout.Padded(graph.Values[output].Columns);

                    // The node reads its inputs while it writes: only what it works on in place may be where its result is.
                    if (node.Inputs.Any(i => Overlap(i, output)))
                    {
                        return false;
                    }
                }

                made.Add(output);
            }

            int[] alive = [.. made.Where(v => lastRead[v] > node.Id && slots[v].Kind == BufferKind.Slot)];
            for (int i = 0; i < alive.Length; i++)
            {
                if (alive.Skip(i + 1).Any(other => group[other] != group[alive[i]] && Overlap(other, alive[i])))
                {
                    return false;
                }
            }

            peak = Math.Max(peak, alive.DistinctBy(v => group[v]).Sum(v => (long)ArenaLayout.Padded(graph.Values[v].Columns)));
            slots.Release(node, node.Id);
        }

        ArenaLayout arena = slots.Layout;
        return arena.Slots.All(s => s.Offset % ArenaLayout.Alignment == 0 && s.Offset + s.Columns <= arena.Columns)
            && arena.Columns <= taken && arena.Columns >= peak;

        bool Overlap(int a, int b)
        {
            if (slots[a].Kind != BufferKind.Slot || slots[b].Kind != BufferKind.Slot)
            {
                return false;
            }

            (ArenaSlot x, ArenaSlot y) = (slots.Layout.Slots[slots[a].Index], slots.Layout.Slots[slots[b].Index]);
            return x.Offset < y.Offset + y.Columns && y.Offset < x.Offset + x.Columns;
        }
    }

    // Inputs are counted from the newest value back, so that most lives are short and some are long.
    private static ParallelGraph Graph((int First, int Second, int Width, Placing Placing)[] steps)
    {
        var b = new GraphBuilder();
        var made = new List<int> { b.Value("x", ValueKind.Activation, 30) };
        foreach ((int first, int second, int width, Placing placing) in steps)
        {
            int[] inputs = [Recent(first), Recent(second)];
            int columns = placing is Placing.InPlace or Placing.Alias ? b[inputs[0]].Columns : width;
            int[] outputs = [.. Enumerable.Range(0, placing == Placing.TwoResults ? 2 : 1)
                .Select(_ => b.Value("v", ValueKind.Activation, columns))];
            b.Node(OpKind.Add, inputs, outputs);
            made.AddRange(outputs);
        }

        return b.Build();

        int Recent(int number) => made[^(1 + (number == int.MaxValue ? 0 : number % Math.Min(made.Count, 6)))];
    }
}
