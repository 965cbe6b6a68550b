using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>The operations that a bypass is composed of.</summary>
internal sealed partial class ReferenceTests
{
    [Test]
    public void WidenAndOuter_AreTheGradientsOfNarrow()
    {
        (Matrix x, Matrix m, Matrix du) = (Random(4, 5), Random(2, 5), Random(4, 2));
        double Loss() => Reference.Narrow(x, m, 1.7).Dot(du);
        AssertGradient(Loss, x, Reference.Widen(du, m, 1.7));
        AssertGradient(Loss, m, Reference.Outer(du, x, 1.7));
    }

    [Test]
    public void NarrowAndOuter_AreTheGradientsOfWiden()
    {
        (Matrix u, Matrix m, Matrix dy) = (Random(4, 2), Random(2, 5), Random(4, 5));
        double Loss() => Reference.Widen(u, m, 1.7).Dot(dy);
        AssertGradient(Loss, u, Reference.Narrow(dy, m, 1.7));
        AssertGradient(Loss, m, Reference.Outer(u, dy, 1.7));
    }

    [Test]
    public void ColumnSums_AreTheGradientOfABias()
    {
        (Matrix y, Matrix bias, Matrix dy) = (Random(4, 5), Random(1, 5), Random(4, 5));
        AssertGradient(() => Reference.AddBias(y, bias).Dot(dy), bias, Reference.ColumnSums(dy));
    }

    [Test]
    public void ScaleColumnsBackward_IsTheGradient()
    {
        (Matrix x, Matrix gain, Matrix dy) = (Random(4, 5), Random(1, 5), Random(4, 5));
        (Matrix gradGain, Matrix dx) = Reference.ScaleColumnsBackward(x, dy, gain);
        double Loss() => Reference.ScaleColumns(x, gain).Dot(dy);
        AssertGradient(Loss, gain, gradGain);
        AssertGradient(Loss, x, dx);
    }

    [Test]
    public void ScaleColumns_AddedToItsArgument_IsTheProduct()
    {
        (Matrix x, Matrix gain) = (Random(4, 1), Matrix.Filled(1, 1, 1.25));
        Matrix sum = x.Plus(Reference.ScaleColumns(x, gain));
        Assert.That(sum.Values, Is.EqualTo(x.Map(value => 1.25 * value).Values).Within(1e-12));
    }

    [Test]
    public void ReluBackward_IsTheGradient()
    {
        (Matrix x, Matrix dy) = (Random(4, 5), Random(4, 5));
        Matrix dx = Reference.ReluBackward(Reference.Relu(x), dy);
        AssertGradient(() => Reference.Relu(x).Dot(dy), x, dx);
        Assert.That(dx.Values, Has.Some.Zero.And.Some.Not.Zero);
    }

    [Test]
    public void SiluBackward_IsTheGradient()
    {
        (Matrix x, Matrix dy) = (Random(4, 5, 6), Random(4, 5));
        AssertGradient(() => Reference.Silu(x).Dot(dy), x, Reference.SiluBackward(x, dy));
        Assert.That(Reference.Silu(Matrix.Filled(1, 1, 40))[0, 0], Is.EqualTo(40).Within(1e-12));
    }
}
