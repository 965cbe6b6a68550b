using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Models;

[DeviceFixture]
internal sealed class RandomWeightsTests
{
    [Test]
    public void Matrix_EveryWeight_HasValuesOfItsOwnAndTheWantedDeviation([Values(DType.F32, DType.BF16)] DType type)
    {
        ModelConfig config = TinyModel.ConfigOf(ModelArchitecture.Qwen2);
        using var weights = new RandomWeights(config, type, seed: 3);
        WeightShape[] shapes = [.. DecoderWeights.Of(config).Where(shape => !shape.IsVector)];
        float[][] values = [.. shapes.Select(shape => Values(weights.Matrix(shape)))];
        Assert.That(values.Select(v => v.Length), Is.EqualTo(shapes.Select(shape => shape.Count)));
        Assert.That(values.Select(v => string.Join(' ', v.Take(4))), Is.Unique);
        Assert.That(values.Select(v => Math.Sqrt(v.Average(x => (double)x * x))), Is.All.EqualTo(0.02).Within(0.002));
    }

    [Test]
    public void Matrix_LargerThanTheRandomPart_HasNoTwoEqualRows()
    {
        ModelConfig config = TinyModel.ConfigOf(ModelArchitecture.Llama) with { VocabularySize = 400_000 };
        using var weights = new RandomWeights(config, DType.BF16, seed: 3);
        HostMatrix head = weights.Matrix(DecoderWeights.Of(config).MaxBy(shape => shape.Count));
        Assert.That((long)head.Rows * head.Columns, Is.GreaterThan(1 << 24), "Control: it repeats itself.");
        Assert.That(
            Enumerable.Range(0, 1000).Select(i => 399 * i).Select(row => (head[row, 0], head[row, 1], head[row, 2], head[row, 3])),
            Is.Unique);
    }

    [Test]
    public void Vector_GainsAreOneAndBiasesAreNot()
    {
        ModelConfig config = TinyModel.ConfigOf(ModelArchitecture.Qwen2);
        using var weights = new RandomWeights(config, DType.BF16, seed: 3);
        ILookup<bool, WeightShape> vectors = DecoderWeights.Of(config).Where(shape => shape.IsVector).ToLookup(RandomCheckpoint.IsGain);
        Assert.That(vectors[true].SelectMany(weights.Vector), Is.Not.Empty.And.All.EqualTo(1f));
        Assert.That(vectors[false].SelectMany(weights.Vector), Is.Not.Empty.And.All.Not.EqualTo(1f));
    }

    [Test]
    public async Task LoadRandomAsync_EverySeed_AnswersInItsOwnWay()
    {
        int[][] answers = [await AnswerAsync(1), await AnswerAsync(1), await AnswerAsync(2)];
        Assert.That(answers[1], Is.EqualTo(answers[0]).And.Length.EqualTo(12));
        Assert.That(answers[2], Is.Not.EqualTo(answers[0]), "Control: another seed answers otherwise.");
    }

    private static async Task<int[]> AnswerAsync(ulong seed)
    {
        using var weights = new RandomWeights(TinyModel.ConfigOf(ModelArchitecture.Llama), DType.BF16, seed, deviation: 0.15f);
        var options = new CoServingOptions { Device = TestDevice.Of(1), ProfilingTimeMax = TimeSpan.Zero };
        await using CoServingEngine engine = await CoServingEngine.LoadRandomAsync(weights, options).Soon();
        GenerationResult result = await engine.CompleteAsync(new GenerationRequest([1, 2, 3]) { MaxTokens = 12, IgnoreEos = true }).Soon();
        return [.. result.Tokens];
    }

    private static float[] Values(HostMatrix matrix) =>
        [.. Enumerable.Range(0, matrix.Rows).SelectMany(r => Enumerable.Range(0, matrix.Columns).Select(c => matrix[r, c]))];
}
