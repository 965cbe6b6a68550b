using FlexLLM.Benchmarks;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>
/// Logits, losses, gradients and optimizer steps of HuggingFace transformers and PEFT, within the bounds of the CPU backend. Checks
/// that ask for the same bits in company are not asked here.
/// </summary>
[TorchFixture]
internal sealed class GoldensOnTorchTests
{
    [Test]
    public void Verify_PartInTheRepository_HasItsValues() =>
        Verify(Path.Combine(SharedData.RepositoryRoot, "FlexLLM.Core.Tests", "Goldens", "data"), values: 15);

    [Test]
    [Category("Slow")]
    public void Verify_FullSet_HasItsValues() => Verify(SharedData.Require("golden"), values: 90);

    private static void Verify(string folder, int values)
    {
        using var output = new StringWriter();
        new VerifyVerb(output).Verify(folder, () => TorchBackend.Create("cpu").CreateBackend());
        string[] lines = output.ToString().Split('\n', StringSplitOptions.RemoveEmptyEntries)[..^1];
        string[] checks = [.. lines.Where(line => !line.Contains("same bits", StringComparison.Ordinal))];
        TestContext.Out.WriteLine($"{checks.Length} values of {lines.Length} checks");
        Assert.That(checks, Has.Length.AtLeast(values), "A check that is not made is not passed.");
        Assert.That(checks, Is.All.StartsWith("ok  "), string.Join('\n', checks));
    }
}
