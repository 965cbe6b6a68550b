using FlexLLM.Backends;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>What the one public line does with bad input, and where something is missing.</summary>
[TestFixture]
internal sealed class TorchBackendTests
{
    [TestCase("")]
    [TestCase("gpu")]
    [TestCase("CPU")]
    [TestCase("cpu:0")]
    [TestCase("cuda:")]
    [TestCase("cuda:-1")]
    [TestCase("cuda: 1")]
    [TestCase("cuda:1x")]
    [TestCase("cuda:99999999999")]
    public void Create_UnknownDevice_NamesTheKnown(string device)
    {
        ArgumentException? error = Assert.Throws<ArgumentException>(() => TorchBackend.Create(device));
        Assert.That(error!.Message, Does.Contain($"'{device}'").And.Contain("\"cpu\"").And.Contain("\"cuda:N\""));
    }

    [Test]
    public void Create_NoDevice_IsRefused() => Assert.Throws<ArgumentNullException>(() => TorchBackend.Create(null!));

    [TestCase("cpu")]
    [TestCase("cuda")]
    [TestCase("cuda:1")]
    public void Create_WithoutLibtorch_NamesThePackages(string device)
    {
        if (TorchFixtureAttribute.Reason is null)
        {
            Assert.Ignore("libtorch is present.");
        }

        FlexLlmException? error = Assert.Throws<FlexLlmException>(() => TorchBackend.Create(device));
        Assert.That(
            error!.Message,
            Does.Contain("TorchSharp-cuda-linux").And.Contain("TorchSharp-cuda-windows").And.Contain("TorchSharp-cpu"));
        Assert.That(error.InnerException, Is.Not.Null);
    }

    /// <summary>What the runtime throws where a function or a member is not in the version that it finds.</summary>
    [Test]
    public void FaultOf_OtherVersion_SaysWhichFit()
    {
        Exception[] faults =
        [
            new EntryPointNotFoundException("THSTensor_x"), new MissingMethodException("torch.x"), new FileLoadException("TorchSharp"),
            new TypeLoadException("torch+x"), new TypeInitializationException("torch", new MissingFieldException("torch.x")),
        ];
        foreach (Exception fault in faults)
        {
            string message = TorchBackend.FaultOf("cuda:0", fault)!.Message;
            Assert.That(message, Does.Contain("'cuda:0' needs another version").And.Contain("0.105.2 to 0.107.0"), fault.GetType().Name);
            Assert.That(message, Does.Contain("the same version"));
        }
    }

    [Test]
    public void FaultOf_NothingOfTheLoader_IsNone() =>
        Assert.That(TorchBackend.FaultOf("cpu", new InvalidOperationException("x")), Is.Null);

    [Test]
    public void Create_WithTf32_TurnsItOnUntilTheNextDevice()
    {
        if (TorchFixtureAttribute.Reason is string reason)
        {
            Assert.Ignore(reason);
        }

        TorchBackend.Create("cpu", new TorchOptions { AllowTf32 = true });
        Assert.That((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32), Is.EqualTo((true, true)));
        TorchBackend.Create("cpu");
        Assert.That((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32), Is.EqualTo((false, false)));
    }

    [Test]
    public void Create_WithABf16CacheOrActivations_SaysSoInItsName()
    {
        if (TorchFixtureAttribute.Reason is string reason)
        {
            Assert.Ignore(reason);
        }

        using IComputeBackend plain = TorchBackend.Create("cpu", new TorchOptions()).CreateBackend();
        using IComputeBackend narrow = TorchBackend.Create("cpu", new TorchOptions { Bf16KvCache = true }).CreateBackend();
        var options = new TorchOptions { Bf16KvCache = true, Bf16Activations = true };
        using IComputeBackend both = TorchBackend.Create("cpu", options).CreateBackend();
        Assert.That((plain.Name, narrow.Name), Is.EqualTo(("torch (cpu)", "torch (cpu, BF16 KV cache)")));
        Assert.That(both.Name, Is.EqualTo("torch (cpu, BF16 KV cache, BF16 activations)"));
    }

    [TestCase("cuda")]
    [TestCase("cuda:1000")]
    public void Create_WithoutSuchGpu_SaysWhatToDo(string device)
    {
        if (TorchFixtureAttribute.Reason is string reason)
        {
            Assert.Ignore(reason);
        }

        if (device == "cuda" && torch.cuda.is_available())
        {
            Assert.Ignore("A GPU is present.");
        }

        FlexLlmException? error = Assert.Throws<FlexLlmException>(() => TorchBackend.Create(device));
        Assert.That(error!.Message, Does.Contain("TorchSharp-cuda-linux").Or.Contain("numbered from 0"));
    }
}
