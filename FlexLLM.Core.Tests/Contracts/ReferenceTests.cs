using FlexLLM.Backends;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>
/// Proves <see cref="Reference"/>: every gradient against central differences of its forward pass, the rest against
/// identities that are derived otherwise.
/// </summary>
[TestFixture]
internal sealed partial class ReferenceTests
{
    private const double Epsilon = 1e-5;

    private SeededRandom _random;

    [SetUp]
    public void Seed() => _random = new SeededRandom(5);

    [Test]
    public void RmsNormBackward_IsTheGradient([Values(1, 3)] int groups)
    {
        (Matrix x, Matrix gain, Matrix dy) = (Random(3, groups * 6), Random(1, 6), Random(3, groups * 6));
        Matrix dx = Reference.RmsNormBackward(x, gain, Epsilon, dy);
        AssertGradient(() => Reference.RmsNorm(x, gain, Epsilon).Dot(dy), x, dx);
    }

    [Test]
    public void LinearBackwardInput_IsTheGradient()
    {
        (Matrix x, Matrix w, Matrix bias, Matrix dy) = (Random(3, 5), Random(4, 5), Random(1, 4), Random(3, 4));
        AssertGradient(() => Reference.Linear(x, w, bias).Dot(dy), x, Reference.LinearBackwardInput(dy, w));
    }

    [Test]
    public void LoraBypassBackward_IsTheGradient()
    {
        (Matrix x, Matrix a, Matrix b, Matrix dy) = (Random(4, 5), Random(2, 5), Random(2, 3), Random(4, 3));
        (Matrix gradA, Matrix gradB, Matrix dx) = Reference.LoraBypassBackward(x, dy, a, b, 1.7);
        double Loss() => Reference.LoraBypass(x, a, b, 1.7).Dot(dy);
        AssertGradient(Loss, a, gradA);
        AssertGradient(Loss, b, gradB);
        AssertGradient(Loss, x, dx);
    }

    [Test]
    public void RopeInverse_IsTheGradientAndTheInverse()
    {
        (Matrix x, Matrix dy, Matrix table) = (Random(3, 8), Random(3, 8), RotationTable(9, 4));
        int[] positions = [8, 0, 5];
        Matrix dx = Reference.Rope(dy, positions, table, inverse: true);
        AssertGradient(() => Reference.Rope(x, positions, table, inverse: false).Dot(dy), x, dx);
        Matrix back = Reference.Rope(Reference.Rope(x, positions, table, inverse: false), positions, table, inverse: true);
        Assert.That(back.Values, Is.EqualTo(x.Values).Within(1e-6));
    }

    [TestCase(1, 0)]
    [TestCase(1, 3)]
    [TestCase(3, 2)]
    public void AttentionBackward_IsTheGradient(int group, int start)
    {
        var shape = new HeadShape(KvHeads: 2, group, HeadDim: 4);
        (Matrix q, Matrix dO) = (Random(3, shape.QueryColumns), Random(3, shape.QueryColumns));
        (Matrix k, Matrix v) = (Random(start + 3, shape.KvColumns), Random(start + 3, shape.KvColumns));
        (Matrix dQ, Matrix dK, Matrix dV) = Reference.AttentionBackward(q, k, v, dO, start, shape);
        double Loss() => Reference.Attention(q, k, v, start, shape).O.Dot(dO);
        AssertGradient(Loss, q, dQ);
        AssertGradient(Loss, k, dK);
        AssertGradient(Loss, v, dV);
    }

    [Test]
    public void Attention_Windows_AddUpToTheWhole()
    {
        var shape = new HeadShape(1, 2, 4);
        (Matrix q, Matrix dO) = (Random(7, shape.QueryColumns), Random(7, shape.QueryColumns));
        (Matrix k, Matrix v) = (Random(7, shape.KvColumns), Random(7, shape.KvColumns));
        (Matrix dQ, Matrix dK, _) = Reference.AttentionBackward(q, k, v, dO, 0, shape);
        (Matrix headDQ, Matrix headDK, _) = Reference.AttentionBackward(q.Slice(0, 3), k, v, dO.Slice(0, 3), 0, shape);
        (Matrix tailDQ, Matrix tailDK, _) = Reference.AttentionBackward(q.Slice(3, 4), k, v, dO.Slice(3, 4), 3, shape);
        tailDK.SetRows(0, tailDK.Slice(0, 3).Plus(headDK));
        Assert.That(tailDK.Values, Is.EqualTo(dK.Values).Within(1e-12));
        Assert.That(headDQ.Values.Concat(tailDQ.Values), Is.EqualTo(dQ.Values).Within(1e-12));
    }

    [Test]
    public void SiluGateBackward_IsTheGradient()
    {
        (Matrix gate, Matrix up, Matrix dy) = (Random(2, 7, 6), Random(2, 7), Random(2, 7));
        (Matrix dGate, Matrix dUp) = Reference.SiluGateBackward(gate, up, dy);
        double Loss() => Reference.SiluGate(gate, up).Dot(dy);
        AssertGradient(Loss, gate, dGate);
        AssertGradient(Loss, up, dUp);
    }

    [Test]
    public void CrossEntropyBackward_IsTheGradient()
    {
        (Matrix x, Matrix head) = (Random(4, 5), Random(6, 5));
        int[] targets = [3, -1, 0, 5];
        Matrix dx = Reference.CrossEntropyBackward(x, targets, head, 0.3);
        AssertGradient(() => 0.3 * Reference.CrossEntropy(x, targets, head).Sum(), x, dx);
    }

    [Test]
    public void AdamWStep_ConstantGradient_MovesByTheLearningRate()
    {
        // With a constant gradient both corrected moments are exact averages: m = g, sqrt(v) = |g|, at every step.
        Matrix parameter = Matrix.Filled(1, 1, 2);
        Matrix gradient = Matrix.Filled(1, 1, -0.25);
        (Matrix m, Matrix v) = (new Matrix(1, 1), new Matrix(1, 1));
        double expected = 2;
        for (int step = 1; step <= 5; step++)
        {
            Reference.AdamWStep(parameter, gradient, m, v, new AdamWStepOptions(0.5f, 0.75f, 0.875f, 0.25f, 0.125f, step));
            expected = (expected * (1 - (0.5 * 0.125))) + (0.5 * 0.25 / (0.25 + 0.25));
            Assert.That(parameter[0, 0], Is.EqualTo(expected).Within(1e-12));
        }
    }

    [TestCase(false)]
    [TestCase(true)]
    public void SgdStep_ConstantGradient_FollowsTheGeometricSeries(bool nesterov)
    {
        (Matrix parameter, Matrix gradient, Matrix velocity) =
            (Matrix.Filled(1, 1, 2), Matrix.Filled(1, 1, 0.5), new Matrix(1, 1));
        double expected = 2;
        for (int step = 1; step <= 4; step++)
        {
            Reference.SgdStep(parameter, gradient, velocity, new SgdStepOptions(0.125f, 0.75f, nesterov, 0));
            double v = 0.5 * (1 - Math.Pow(0.75, step)) / 0.25;
            expected -= 0.125 * (nesterov ? 0.5 + (0.75 * v) : v);
            Assert.That(parameter[0, 0], Is.EqualTo(expected).Within(1e-12));
        }
    }

    [Test]
    public void SgdStep_NoMomentum_DecaysAndDescends()
    {
        (Matrix parameter, Matrix gradient) = (Matrix.Filled(1, 1, 2), Matrix.Filled(1, 1, 0.5));
        Reference.SgdStep(parameter, gradient, null, new SgdStepOptions(0.25f, 0, false, 0.125f));
        Assert.That(parameter[0, 0], Is.EqualTo(2 - (0.25 * (0.5 + (0.125 * 2)))).Within(1e-12));
    }

    [Test]
    public void Rounded_BF16_TakesTheNearestNeighbourAndEvenOnTies()
    {
        for (int i = 0; i < 1000; i++)
        {
            float value = (float)((_random.NextDouble() * 4) - 2);
            float rounded = (float)Matrix.Filled(1, 1, value).Rounded(DType.BF16)[0, 0];
            float down = BitConverter.UInt32BitsToSingle(BitConverter.SingleToUInt32Bits(value) & 0xFFFF0000);
            float up = BitConverter.UInt32BitsToSingle(BitConverter.SingleToUInt32Bits(down) + 0x10000);
            Assert.That(rounded, Is.EqualTo(Math.Abs(value - down) < Math.Abs(up - value) ? down : up));
        }

        Assert.That(Matrix.Filled(1, 1, 1 + (1.0 / 256)).Rounded(DType.BF16)[0, 0], Is.EqualTo(1));
        Assert.That(Matrix.Filled(1, 1, 1 + (3.0 / 256)).Rounded(DType.BF16)[0, 0], Is.EqualTo(1 + (4.0 / 256)));
    }

    [Test]
    public void AssertGradient_WrongGradient_Fails()
    {
        (Matrix x, Matrix w, Matrix dy) = (Random(3, 5), Random(4, 5), Random(3, 4));
        Matrix wrong = Reference.LinearBackwardInput(dy, w).Map(value => value * 1.0001);
        Assert.Throws<AssertionException>(() => AssertGradient(() => Reference.Linear(x, w).Dot(dy), x, wrong));
    }

    /// <summary>cos and sin of angles that differ by position and pair.</summary>
    internal static Matrix RotationTable(int positions, int headDim)
    {
        var table = new Matrix(positions, headDim);
        for (int position = 0; position < positions; position++)
        {
            for (int i = 0; i < headDim / 2; i++)
            {
                (double sin, double cos) = Math.SinCos(position / Math.Pow(100, 2.0 * i / headDim));
                table[position, i] = (float)cos;
                table[position, (headDim / 2) + i] = (float)sin;
            }
        }

        return table;
    }

    /// <summary>Central differences of a loss in each element of one of its inputs.</summary>
    internal static Matrix NumericGradient(Func<double> loss, Matrix input)
    {
        const double step = 1e-5;
        Matrix numeric = new(input.Rows, input.Columns);
        for (int i = 0; i < input.Values.Length; i++)
        {
            double kept = input.Values[i];
            input.Values[i] = kept + step;
            double above = loss();
            input.Values[i] = kept - step;
            double below = loss();
            input.Values[i] = kept;
            numeric.Values[i] = (above - below) / (2 * step);
        }

        return numeric;
    }

    private static void AssertGradient(Func<double> loss, Matrix input, Matrix gradient) =>
        Assert.That(gradient.Values, Is.EqualTo(NumericGradient(loss, input).Values).Within(1e-7));

    private Matrix Random(int rows, int columns, double scale = 1) => Matrix.Random(ref _random, rows, columns, scale);
}
