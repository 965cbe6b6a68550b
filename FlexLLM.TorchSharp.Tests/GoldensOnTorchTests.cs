using System.Globalization;
using System.Text.RegularExpressions;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Backends.Torch;
using FlexLLM.Benchmarks;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>
/// Logits, losses, gradients and optimizer steps of HuggingFace transformers and PEFT, within the bounds of the CPU backend; and with a
/// BF16 cache, within bounds that were measured and as far off as the managed backend is with keys and values rounded beforehand; and with
/// BF16 activations, within bounds that were measured. Checks that ask for the same bits in company are not asked here.
/// </summary>
[TorchFixture]
internal sealed partial class GoldensOnTorchTests
{
    // Twice the worst that was measured over the full set: 0.14, 0.19 and 0.10 of logits that go up to 16 (3 in the mean square), 2.6 % of
    // a gradient's norm, 0.03 % of a loss, 0.05 % of the losses of AdamW, 11 % of those of SGD, whose rate amplifies what its first steps
    // are off by.
    private static readonly Dictionary<string, double> Bf16CacheBounds = new()
    {
        ["logits"] = 0.28,
        ["logits_last4"] = 0.38,
        ["logits_sum"] = 52,
        ["logits_sqsum"] = 212,
        ["lora.logits_last4"] = 0.21,
        ["lora.grad (worst tensor)"] = 5.3e-2,
        ["lora.loss"] = 5.6e-4,
        ["lora.sgd.losses"] = 0.23,
        ["lora.sgd.final (rms)"] = 2.6e-3,
        ["lora.adamw.losses"] = 1.1e-3,
        ["lora.adamw.final (rms)"] = 1.2e-3,
    };

    // The managed backend, given rounded keys and values, is off by as much but for 20 % in the losses of optimizers, on another
    // maker's CPU for 44 %: a rounding that falls the other way is one of 8 bits.
    private const double ManagedPercent = 40;
    private const double ManagedLossesPercent = 80;

    // The sum of all logits of a text, tens of thousands of both signs, is off by what does not cancel: with 1 and 2 threads and with three
    // instruction sets, on one machine, by 0.2 to 1.9 times the bound.
    private const double SumFactor = 4;

    // 20 of 432 tokens, all of one answer after its fourth.
    private const int Bf16CacheTokensLostMax = 40;

    // Twice the worst that was measured over the full set again: 0.32, 0.43 and 0.33 of such logits, 8.1 % of a gradient's norm, 0.08 % of
    // a loss, 0.32 % of the losses of AdamW, 14 % of those of SGD. A BF16 cache beside rounds nothing more: what it is given is BF16.
    private static readonly Dictionary<string, double> Bf16ActivationBounds = new()
    {
        ["logits"] = 0.64,
        ["logits_last4"] = 0.86,
        ["logits_sum"] = 112,
        ["logits_sqsum"] = 330,
        ["lora.logits_last4"] = 0.66,
        ["lora.grad (worst tensor)"] = 0.17,
        ["lora.loss"] = 1.6e-3,
        ["lora.sgd.losses"] = 0.27,
        ["lora.sgd.final (rms)"] = 3e-3,
        ["lora.adamw.losses"] = 6.4e-3,
        ["lora.adamw.final (rms)"] = 2.6e-3,
    };

    // Of 432: 31, and 53 as a GPU multiplies and attends; on another maker's CPU 63 and 60.
    private const int Bf16ActivationTokensLostMax = 106;

    private static string InTheRepository => Path.Combine(SharedData.RepositoryRoot, "FlexLLM.Core.Tests", "Goldens", "data");

    [Test]
    public void Verify_PartInTheRepository_HasItsValues() => Verify(InTheRepository, values: 15);

    [Test]
    [Category("Slow")]
    public void Verify_FullSet_HasItsValues() => Verify(SharedData.Require("golden"), values: 90);

    [Test]
    public void Verify_PartInTheRepositoryOnABf16Cache_IsOffByWhatWasMeasured() => VerifyBf16Cache(InTheRepository, values: 15);

    [Test]
    [Category("Slow")]
    public void Verify_FullSetOnABf16Cache_IsOffByWhatWasMeasured() => VerifyBf16Cache(SharedData.Require("golden"), values: 90);

    [Test]
    public void Verify_PartInTheRepositoryOnBf16Activations_IsOffByWhatWasMeasured([Values] bool asAGpu) =>
        VerifyBf16Activations(InTheRepository, asAGpu, values: 15);

    [Test]
    [Category("Slow")]
    public void Verify_FullSetOnBf16Activations_IsOffByWhatWasMeasured([Values] bool asAGpu) =>
        VerifyBf16Activations(SharedData.Require("golden"), asAGpu, values: 90);

    private static void Verify(string folder, int values)
    {
        string[] checks = ChecksOf(folder, () => TorchBackend.Create("cpu").CreateBackend(), values);
        Assert.That(checks.Where(check => !IsWithin(check)), Is.Empty, string.Join('\n', checks));
    }

    private static bool IsWithin(string check)
    {
        Match match = ErrorLine().Match(check);
        return check.StartsWith("ok  ", StringComparison.Ordinal) ||
            (match.Success && match.Groups["check"].Value.StartsWith("logits_sum", StringComparison.Ordinal) &&
                Value(match, "error") <= SumFactor * Value(match, "bound"));
    }

    private static void VerifyBf16Cache(string folder, int values)
    {
        var options = new TorchOptions { Bf16KvCache = true };
        string[] checks = ChecksOf(folder, () => TorchBackend.Create("cpu", options).CreateBackend(), values);
        string[] managed = ChecksOf(folder, () => new RoundingBackend(), values);
        Dictionary<string, double> worst = WorstErrors(checks);
        Dictionary<string, double> expected = WorstErrors(managed);
        Assert.That(worst.Keys, Is.EquivalentTo(Bf16CacheBounds.Keys));
        Assert.Multiple(() =>
        {
            foreach ((string kind, double error) in worst)
            {
                TestContext.Out.WriteLine($"{kind}: {error:0.00e+00}, managed with rounded keys and values {expected[kind]:0.00e+00}");
                Assert.That(error, Is.LessThanOrEqualTo(Bf16CacheBounds[kind]), kind);
                double percent = kind.EndsWith("losses", StringComparison.Ordinal) ? ManagedLossesPercent : ManagedPercent;
                Assert.That(error, Is.EqualTo(expected[kind]).Within(percent).Percent, kind);
            }
        });
        TestContext.Out.WriteLine($"tokens lost: {TokensLost(checks)}, managed {TokensLost(managed)}");
        Assert.That(TokensLost(checks), Is.LessThanOrEqualTo(Bf16CacheTokensLostMax));
        Assert.That(checks.Count(line => line.StartsWith("FAIL", StringComparison.Ordinal)), Is.GreaterThan(values / 2),
            "Control: the bounds of F32 see the rounding.");
    }

    // As a GPU does it: products of BF16 operands, and a BF16 cache beside.
    private static void VerifyBf16Activations(string folder, bool asAGpu, int values)
    {
        DType kvType = asAGpu ? DType.BF16 : DType.F32;
        string[] checks = ChecksOf(
            folder,
            () => new TorchComputeBackend(
                new torch.Device(DeviceType.CPU), kvType: kvType, multipliesBf16: asAGpu, activationType: DType.BF16),
            values);
        Dictionary<string, double> worst = WorstErrors(checks);
        Assert.That(worst.Keys, Is.EquivalentTo(Bf16ActivationBounds.Keys));
        Assert.Multiple(() =>
        {
            foreach ((string kind, double error) in worst)
            {
                TestContext.Out.WriteLine($"{kind}: {error:0.00e+00}");
                Assert.That(error, Is.LessThanOrEqualTo(Bf16ActivationBounds[kind]), kind);
            }
        });
        TestContext.Out.WriteLine($"tokens lost: {TokensLost(checks)}");
        Assert.That(TokensLost(checks), Is.LessThanOrEqualTo(Bf16ActivationTokensLostMax));
        Assert.That(checks.Count(line => line.StartsWith("FAIL", StringComparison.Ordinal)), Is.GreaterThan(values / 2),
            "Control: the bounds of F32 see the rounding.");
    }

    // By kind of check: over models, adapters and lengths.
    private static Dictionary<string, double> WorstErrors(string[] checks)
    {
        Dictionary<string, double> worst = [];
        foreach (Match check in checks.Select(line => ErrorLine().Match(line)).Where(match => match.Success))
        {
            string kind = Length().Replace(Variant().Replace(check.Groups["check"].Value, "lora."), "");
            worst[kind] = Math.Max(worst.GetValueOrDefault(kind), Value(check, "error"));
        }

        return worst;
    }

    private static int TokensLost(string[] checks) => checks.Select(line => TokensLine().Match(line)).Where(match => match.Success)
        .Sum(match => Number(match, "all") - Number(match, "equal"));

    private static double Value(Match match, string group) =>
        double.Parse(match.Groups[group].ValueSpan, CultureInfo.InvariantCulture);

    private static int Number(Match match, string group) => int.Parse(match.Groups[group].ValueSpan, CultureInfo.InvariantCulture);

    private static string[] ChecksOf(string folder, Func<IComputeBackend> open, int values)
    {
        using var output = new StringWriter();
        new VerifyVerb(output).Verify(folder, open);
        string[] lines = output.ToString().Split('\n', StringSplitOptions.RemoveEmptyEntries)[..^1];
        string[] checks = [.. lines.Where(line => !line.Contains("same bits", StringComparison.Ordinal))];
        TestContext.Out.WriteLine($"{checks.Length} values of {lines.Length} checks");
        Assert.That(checks, Has.Length.AtLeast(values), "A check that is not made is not passed.");
        return checks;
    }

    [GeneratedRegex(@"^(ok  |FAIL) \S+ +(?<check>\S.*?) +(?<error>\S+) <= (?<bound>\S+)")]
    private static partial Regex ErrorLine();

    [GeneratedRegex(@" (?<equal>\d+) of (?<all>\d+) tokens$")]
    private static partial Regex TokensLine();

    [GeneratedRegex(@"^lora\.[^.]+\.")]
    private static partial Regex Variant();

    [GeneratedRegex(@"\.\d+$")]
    private static partial Regex Length();

    /// <summary>The managed backend, given keys and values that are rounded to BF16 already.</summary>
    private sealed class RoundingBackend() : DelegatingBackend(new CpuBackend(1))
    {
        public override void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments)
        {
            using DeviceTensor keys = Rounded(k, DType.BF16);
            using DeviceTensor values = Rounded(v, DType.BF16);
            Inner.AppendKv(keys, values, layer, segments);
        }
    }
}
