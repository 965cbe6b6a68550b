using FlexLLM.Benchmarks;
using FlexLLM.Tests.Formats;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Goldens;

/// <summary>What HuggingFace transformers and PEFT computed, recomputed by the code of the verb `verify`.</summary>
[TestFixture]
internal sealed class GoldenTests
{
    private static string Folder => Path.Combine(SharedData.RepositoryRoot, "FlexLLM.Core.Tests", "Goldens", "data");

    [Test]
    public void Verify_PartInTheRepository_Passes()
    {
        (int exit, string output) = Verify(Folder);
        Assert.That(exit, Is.Zero, output);
        Assert.That(output, Does.EndWith("22 passed, 0 failed\n"), "a check that is not made is not passed");
    }

    [Test]
    [Category("Slow")]
    public void Verify_FullSet_Passes()
    {
        string golden = SharedData.Require("golden");
        (int exit, string output) = Verify(golden);
        Assert.That(exit, Is.Zero, output);
    }

    // Controls: checks see a tensor that is off by a hundredth; those that compare us with ourselves rightly do not.
    [TestCase("model.safetensors", "model.layers.2.self_attn.k_norm.weight", new[]
    {
        "logits.7", "logits.33", "logits_last4.120", "logits_sum.120", "lora.down_proj.logits_last4.120", "lora.down_proj.loss",
        "lora.down_proj.grad (worst tensor)", "lora.down_proj.sgd.losses", "lora.down_proj.adamw.losses",
    })]
    [TestCase("adapter-down_proj/adapter_model.safetensors", "base_model.model.model.layers.1.mlp.down_proj.lora_A.weight", new[]
    {
        "lora.down_proj.logits_last4.120", "lora.down_proj.loss", "lora.down_proj.grad (worst tensor)",
        "lora.down_proj.sgd.losses", "lora.down_proj.sgd.final (rms)", "lora.down_proj.adamw.losses",
        "lora.down_proj.adamw.final (rms)",
    })]
    public void Verify_OneTensorSlightlyOff_Fails(string file, string tensor, string[] checks)
    {
        using var copy = new TempFolder();
        foreach (string path in Directory.EnumerateFiles(Folder, "*", SearchOption.AllDirectories))
        {
            string target = copy[Path.GetRelativePath(Folder, path)];
            Directory.CreateDirectory(Path.GetDirectoryName(target)!);
            File.Copy(path, target);
        }

        Weights.Change(copy[Path.Combine("tiny-qwen3", file)], tensor, v => v * 1.01f);
        (int exit, string output) = Verify(copy.Path);
        Assert.That(exit, Is.EqualTo(1));
        foreach (string line in output.Split('\n', StringSplitOptions.RemoveEmptyEntries)[..^1])
        {
            bool isControl = checks.Any(c => line.Contains($" {c} ", StringComparison.Ordinal));
            bool comparesWithUs = line.Contains("same bits", StringComparison.Ordinal);
            Assert.That(line, isControl ? Does.StartWith("FAIL") : comparesWithUs ? Does.StartWith("ok") : Is.Not.Empty, output);
        }
    }

    private static (int Exit, string Output) Verify(string folder)
    {
        using var output = new StringWriter { NewLine = "\n" };
        int exit = new VerifyVerb(output).Verify(folder, threads: 1);
        return (exit, output.ToString());
    }
}
