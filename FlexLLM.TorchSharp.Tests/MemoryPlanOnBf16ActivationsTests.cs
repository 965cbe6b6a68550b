using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Tests.Execution;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>The same with BF16 activations: to the byte, and rows of the model's values in half of what F32 takes.</summary>
[DeviceFixture(ModelArchitecture.Llama, DType.BF16)]
[DeviceFixture(ModelArchitecture.Qwen2, DType.F32)]
[DeviceFixture(ModelArchitecture.Qwen3, DType.BF16)]
internal sealed class MemoryPlanOnBf16ActivationsTests(ModelArchitecture architecture, DType weights)
    : MemoryPlanContract(architecture, weights)
{
    private static readonly TorchOptions Options = new() { Bf16Activations = true };

    [Test]
    public void Plan_OfAJob_HalvesActivationsAndNothingElse()
    {
        var lora = new LoraConfig { Rank = 4, TargetModules = PeftConfig.AllModules };
        MemoryTable narrow = JobOn(Options, lora);
        MemoryTable wide = JobOn(new TorchOptions(), lora);
        string[] halved = [MemoryUse.LayerGradient, MemoryUse.BackwardWorkspace];
        foreach (string use in wide.Uses)
        {
            long exact = use == MemoryUse.SavedActivations ? wide.Rows.Where(r => r.Item == "lse").Sum(r => r.Bytes) : 0;
            bool isHalved = halved.Contains(use) || use == MemoryUse.SavedActivations;
            Assert.That(narrow.Of(use), Is.EqualTo(isHalved ? exact + ((wide.Of(use) - exact) / 2) : wide.Of(use)), use);
        }

        TestContext.Out.WriteLine($"{wide}\n{narrow}");
    }

    protected override IComputeBackend CreateBackend() => TorchBackend.Create("cpu", Options).CreateBackend();

    private MemoryTable JobOn(TorchOptions options, PeftConfig method)
    {
        using IComputeBackend backend = TorchBackend.Create("cpu", options).CreateBackend();
        return JobOn(backend, method, window: 16, tokens: 40);
    }
}
