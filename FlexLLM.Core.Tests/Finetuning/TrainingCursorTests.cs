using FlexLLM.Finetuning;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>However a job is cut into windows, it does the same work in the same order.</summary>
[TestFixture]
internal sealed class TrainingCursorTests
{
    private sealed record Shape(int[] Lengths, int Epochs, int Accumulation, ulong? Shuffle, int Layers, int Lowest);

    [Test]
    public void Cursor_AnyWindows_DoesEachTokenForwardAndEachRowOfEachLayerBackwardOnce()
    {
        for (ulong seed = 1; seed <= 200; seed++)
        {
            var random = new SeededRandom(seed);
            Shape shape = RandomShape(ref random);
            TrainingSample[] samples = Samples(shape);
            TrainingCursor cursor = Cursor(shape, samples);
            List<(int Epoch, TrainingSample Sample)> order = Walk(cursor, shape, ref random);
            Assert.That(cursor.Phase, Is.EqualTo(TrainingPhase.Done));
            Assert.That(cursor.Step, Is.EqualTo(cursor.Steps));
            Assert.That(order, Has.Count.EqualTo(samples.Length * shape.Epochs), $"seed {seed}");
            for (int epoch = 0; epoch < shape.Epochs; epoch++)
            {
                Assert.That(order.Where(o => o.Epoch == epoch).Select(o => o.Sample), Is.EquivalentTo(samples));
            }

            var other = new SeededRandom(seed + 1000);
            Assert.That(Walk(Cursor(shape, samples), shape, ref other), Is.EqualTo(order), "windows do not change the order");
        }
    }

    [Test]
    public void SeekToStep_Any_GoesOnAsTheWholeWalkDid()
    {
        for (ulong seed = 1; seed <= 60; seed++)
        {
            var random = new SeededRandom(seed);
            Shape shape = RandomShape(ref random);
            TrainingSample[] samples = Samples(shape);
            List<(int Epoch, TrainingSample Sample)> whole = Walk(Cursor(shape, samples), shape, ref random);
            TrainingCursor resumed = Cursor(shape, samples);
            int step = random.Next(resumed.Steps + 1);
            resumed.SeekToStep(step);
            List<(int, TrainingSample)> rest = Walk(resumed, shape, ref random);
            Assert.That(rest, Is.EqualTo(whole.TakeLast(rest.Count)), $"seed {seed}");
            Assert.That(resumed.Step, Is.EqualTo(resumed.Steps));
            Assert.That(step == resumed.Steps, Is.EqualTo(rest.Count == 0));
        }
    }

    [Test]
    public void GroupTargets_OfAShorterLastGroup_CountsThatGroupAlone()
    {
        var shape = new Shape([3, 5, 4, 2, 6], Epochs: 1, Accumulation: 2, Shuffle: null, Layers: 1, Lowest: 0);
        TrainingCursor cursor = Cursor(shape, Samples(shape));
        var seen = new List<int>();
        while (cursor.Phase != TrainingPhase.Done)
        {
            seen.Add(cursor.GroupTargets);
            cursor.AdvanceForward(cursor.Sample.Ids.Length);
            if (cursor.AdvanceBackward(cursor.RowsLeft))
            {
                cursor.NextSample();
            }
        }

        Assert.That(seen, Is.EqualTo(new[] { 2 + 4, 2 + 4, 3 + 1, 3 + 1, 5 }));
        Assert.That(cursor.Steps, Is.EqualTo(3));
        Assert.That(cursor.TokensTotal, Is.EqualTo(20));
    }

    [Test]
    public void Shuffle_EachEpoch_HasAnOrderOfItsOwn()
    {
        var shape = new Shape([.. Enumerable.Range(2, 20)], Epochs: 2, Accumulation: 1, Shuffle: 3, Layers: 1, Lowest: 0);
        TrainingSample[] samples = Samples(shape);
        var random = new SeededRandom(1);
        List<(int Epoch, TrainingSample Sample)> order = Walk(Cursor(shape, samples), shape, ref random);
        Assert.That(order.Take(20).Select(o => o.Sample), Is.Not.EqualTo(order.Skip(20).Select(o => o.Sample)));
        Assert.That(order.Take(20).Select(o => o.Sample), Is.Not.EqualTo(samples));
        List<(int, TrainingSample)> plain = Walk(Cursor(shape with { Shuffle = null }, samples), shape, ref random);
        Assert.That(plain.Select(o => o.Item2), Is.EqualTo(samples.Concat(samples)));
    }

    [Test]
    public void Advance_BeyondTheWork_IsABrokenInvariant()
    {
        var shape = new Shape([4], 1, 1, null, 2, 0);
        TrainingCursor cursor = Cursor(shape, Samples(shape));
        Assert.That(() => cursor.AdvanceForward(5), Throws.Exception.Message.Contains("Invariant"));
        Assert.That(() => cursor.AdvanceBackward(1), Throws.Exception.Message.Contains("Invariant"));
        Assert.That(cursor.AdvanceForward(4), Is.True);
        Assert.That(() => cursor.AdvanceForward(1), Throws.Exception.Message.Contains("Invariant"));
        Assert.That(() => cursor.AdvanceBackward(5), Throws.Exception.Message.Contains("Invariant"));
    }

    // Does the job in random windows, and checks each sample's work on the way.
    private static List<(int Epoch, TrainingSample Sample)> Walk(TrainingCursor cursor, Shape shape, ref SeededRandom random)
    {
        var order = new List<(int, TrainingSample)>();
        while (cursor.Phase != TrainingPhase.Done)
        {
            TrainingSample sample = cursor.Sample;
            int length = sample.Ids.Length;
            order.Add((cursor.Epoch, sample));
            int[] forward = new int[length];
            int[,] backward = new int[shape.Layers, length];
            while (cursor.Phase == TrainingPhase.Forward && cursor.Sample == sample)
            {
                int count = 1 + random.Next(length - cursor.PositionsDone);
                for (int i = 0; i < count; i++)
                {
                    forward[cursor.PositionsDone + i]++;
                }

                cursor.AdvanceForward(count);
            }

            bool stepped = false;
            int layer = shape.Layers;
            for (bool inSample = true; inSample;)
            {
                Assert.That(cursor.Layer, Is.LessThanOrEqualTo(layer), "layers go down");
                layer = cursor.Layer;
                int count = 1 + random.Next(cursor.RowsLeft);
                for (int i = 1; i <= count; i++)
                {
                    backward[layer, cursor.RowsLeft - i]++;
                }

                bool last = layer == shape.Lowest && count == cursor.RowsLeft;
                stepped = cursor.AdvanceBackward(count);
                inSample = !last;
            }

            Assert.That(forward, Has.All.EqualTo(1));
            for (int l = 0; l < shape.Layers; l++)
            {
                for (int row = 0; row < length; row++)
                {
                    Assert.That(backward[l, row], Is.EqualTo(l >= shape.Lowest ? 1 : 0));
                }
            }

            if (stepped)
            {
                cursor.NextSample();
            }
        }

        return order;
    }

    private static Shape RandomShape(ref SeededRandom random)
    {
        int[] lengths = new int[1 + random.Next(6)];
        for (int i = 0; i < lengths.Length; i++)
        {
            lengths[i] = 2 + random.Next(12);
        }

        int layers = 1 + random.Next(4);
        ulong? shuffle = random.Next(2) == 0 ? null : random.NextUInt64();
        return new Shape(lengths, 1 + random.Next(3), 1 + random.Next(4), shuffle, layers, random.Next(layers));
    }

    private static TrainingSample[] Samples(Shape shape) =>
        [.. shape.Lengths.Select(n => TrainingSample.FromTokens(new int[n], [.. Enumerable.Repeat(true, n)]))];

    private static TrainingCursor Cursor(Shape shape, TrainingSample[] samples) =>
        new(samples, shape.Epochs, shape.Accumulation, shape.Shuffle, shape.Layers, shape.Lowest);
}
