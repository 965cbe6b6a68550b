using System.Runtime.Intrinsics;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Backends;

[TestFixture]
internal sealed class VectorMathTests
{
    [Test]
    public void Exp_AnyNormalResult_IsWithinTwoUlp()
    {
        double worst = 0;
        for (int i = 0; i <= 300_000; i++)
        {
            float x = -87.3f + (i * (88.7f + 87.3f) / 300_000);
            double exact = Math.Exp(x);
            double ulp = MathF.BitIncrement((float)exact) - (float)exact;
            worst = Math.Max(worst, Math.Abs(Exp(x) - exact) / ulp);
        }

        Assert.That(worst, Is.LessThan(2));
    }

    [TestCase(0f, 1f)]
    [TestCase(-0f, 1f)]
    [TestCase(float.NegativeInfinity, 0f)]
    [TestCase(float.PositiveInfinity, float.PositiveInfinity)]
    [TestCase(-1e30f, 0f)]
    [TestCase(89f, float.PositiveInfinity)]
    [TestCase(float.NaN, float.NaN)]
    public void Exp_SpecialValue_IsExact(float x, float expected) => Assert.That(Exp(x), Is.EqualTo(expected));

    [Test]
    public void Exp_DenormalResult_IsKept() => Assert.That(Exp(-95f), Is.EqualTo((float)Math.Exp(-95)).Within(float.Epsilon));

    [Test]
    public void Sigmoid_AnyInput_IsAccurate()
    {
        for (float x = -120; x < 120; x += 0.37f)
        {
            double exact = 1 / (1 + Math.Exp(-(double)x));
            float actual = VectorMath.Sigmoid(Vector256.Create(x))[3];
            Assert.That(actual, Is.EqualTo(exact).Within((4e-7 * exact) + 1e-38), $"x = {x}");
        }
    }

    [Test]
    public unsafe void LoadAndStore_PartOfAVector_TouchNothingElse()
    {
        float* source = stackalloc float[8] { 1, 2, 3, float.NaN, float.NaN, float.NaN, float.NaN, float.NaN };
        float* destination = stackalloc float[8] { 9, 9, 9, 9, 9, 9, 9, 9 };
        Vector256<float> v = VectorMath.Load(source, 3);
        VectorMath.Store(v + v, destination, 2);
        Assert.That(v, Is.EqualTo(Vector256.Create(1f, 2, 3, 0, 0, 0, 0, 0)));
        Assert.That(new ReadOnlySpan<float>(destination, 8).ToArray(), Is.EqualTo((float[])[2, 4, 9, 9, 9, 9, 9, 9]));
    }

    [Test]
    public unsafe void Sum_AnyLength_CoversEveryColumnAndNoOther([Range(0, 70)] int n)
    {
        float[] numbers = new float[n + 8];
        Array.Fill(numbers, float.NaN, n, 8);
        float expected = 0;
        for (int i = 0; i < n; i++)
        {
            numbers[i] = i + 1;
            expected += numbers[i] * numbers[i];
        }

        fixed (float* p = numbers)
        {
            Assert.That(VectorMath.Sum(new DotProduct(p, p), n), Is.EqualTo(expected));
            Assert.That(VectorMath.Max(p, n), Is.EqualTo(n == 0 ? float.NegativeInfinity : n));
        }
    }

    [Test]
    public void Round_AnyFloat_IsTheNearestBFloat16TiesToEven()
    {
        SeededRandom random = new(7);
        for (int i = 0; i < 200_000; i++)
        {
            // Every fourth number is a tie.
            uint bits = (uint)random.NextUInt64();
            bits = i % 4 == 0 ? (bits & 0xFFFF0000) | 0x8000 : bits;
            float value = BitConverter.UInt32BitsToSingle(bits);
            ushort actual = BF16Panel.Round(value);
            if (float.IsNaN(value))
            {
                Assert.That(float.IsNaN(Widen(actual)), $"{bits:x8}");
                continue;
            }

            ushort below = (ushort)(bits >> 16);
            ushort above = (ushort)(below + 1);
            int part = (int)(bits & 0xFFFF);
            ushort expected = part != 0x8000 ? (part < 0x8000 ? below : above) : (below % 2 == 0 ? below : above);
            Assert.That(actual, Is.EqualTo(expected), $"{bits:x8}");
        }
    }

    private static float Widen(ushort bits) => BitConverter.UInt32BitsToSingle((uint)bits << 16);

    private static float Exp(float x)
    {
        // The same bits in every lane, whatever the others hold.
        Vector256<float> e = VectorMath.Exp(Vector256.Create(-3f, x, 100f, x, -200f, 0.5f, float.NaN, x));
        Assert.That(BitConverter.SingleToInt32Bits(e[1]), Is.EqualTo(BitConverter.SingleToInt32Bits(e[3])));
        Assert.That(BitConverter.SingleToInt32Bits(e[1]), Is.EqualTo(BitConverter.SingleToInt32Bits(e[7])));
        return e[1];
    }
}
