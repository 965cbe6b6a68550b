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
    public void Verify_ValuesOfThePartInTheRepository_AreMet()
    {
        using var output = new StringWriter();
        string folder = Path.Combine(SharedData.RepositoryRoot, "FlexLLM.Core.Tests", "Goldens", "data");
        new VerifyVerb(output).Verify(folder, () => TorchBackend.Create("cpu").CreateBackend());
        string[] values = [.. output.ToString().Split('\n').Where(line => line.Contains(" <= ", StringComparison.Ordinal))];
        TestContext.Out.Write(output);
        Assert.That(values, Has.Length.GreaterThan(15));
        Assert.That(values, Is.All.StartsWith("ok  "), output.ToString());
    }
}
