using System.Runtime.InteropServices;
using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using FlexLLM.Tests.Support;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>libtorch's own error of a full device, made by asking for more than any machine has, on its way through the engine.</summary>
[TorchFixture]
internal sealed class TorchOutOfMemoryTests
{
    private const long ElementsMax = 300;
    private readonly GenerationRequest _request = new([1, 2, 3]) { MaxTokens = 20, IgnoreEos = true };
    private string _folder = null!;

    [OneTimeSetUp]
    public void MakeModel() => _folder = TinyCheckpoint.Write(layers: 2);

    [OneTimeTearDown]
    public void RemoveModel() => Directory.Delete(_folder, recursive: true);

    [Test]
    public void IsOutOfMemory_OfAFullDeviceAndOfAWrongShape_TellsThemApart()
    {
        using IComputeBackend backend = TorchBackend.Create("cpu").CreateBackend();
        ExternalException? full = Assert.Throws<ExternalException>(TakeTooMuch);
        Assert.That(backend.IsOutOfMemory(full!), Is.True, full!.Message);
        ExternalException? wrong = Assert.Throws<ExternalException>(() =>
        {
            using torch.Tensor a = torch.zeros(2L, 3L);
            a.mm(a);
        });
        Assert.That(backend.IsOutOfMemory(wrong!), Is.False, wrong!.Message);
    }

    [Test]
    public async Task CompleteAsync_DeviceFullInAttention_EndsTheRequestAndTheEngineLives()
    {
        bool isFull = false;
        long before = torch.Tensor.TotalCount;
        await using (CoServingEngine engine = await StartAsync("Attention", () => Volatile.Read(ref isFull)))
        {
            IReadOnlyList<int> expected = (await engine.CompleteAsync(_request)).Tokens;
            Volatile.Write(ref isFull, true);
            GenerationResult ended = await engine.CompleteAsync(_request);
            Assert.That(ended.FinishReason, Is.EqualTo(FinishReason.Error));
            Assert.That(ended.FinishDetail, Does.Contain("ran out of memory").And.Contain("allocate"));
            Volatile.Write(ref isFull, false);
            Assert.That((await engine.CompleteAsync(_request)).Tokens, Is.EqualTo(expected));
            Assert.That(torch.Tensor.TotalCount, Is.GreaterThan(before), "Control: an engine holds some.");
        }

        Assert.That(torch.Tensor.TotalCount, Is.EqualTo(before), "An operation that fails leaves no tensor either.");
    }

    [TestCase("AttentionBackward")]
    [TestCase("FusedLinearCrossEntropy")]
    public async Task StartFinetuningAsync_DeviceFullInTheJob_FailsItAndTheRequestGoesOn(string operation)
    {
        bool isFull = true;
        await using CoServingEngine engine = await StartAsync(operation, () => Volatile.Read(ref isFull));
        IReadOnlyList<int> expected = (await engine.CompleteAsync(_request)).Tokens;
        FinetuningJob job = await engine.StartFinetuningAsync(TinyCheckpoint.Job("a"));
        Task<GenerationResult> beside = engine.CompleteAsync(_request);
        Exception? fault = Assert.CatchAsync(() => job.Completion);
        Assert.That(fault, Is.TypeOf<InsufficientMemoryException>().With.InnerException.TypeOf<ExternalException>());
        Assert.That((await beside).Tokens, Is.EqualTo(expected));
        Volatile.Write(ref isFull, false);
        job = await engine.StartFinetuningAsync(TinyCheckpoint.Job("b"));
        Assert.That((await job.Completion).Status, Is.EqualTo(FinetuningStatus.Completed));
    }

    private static void TakeTooMuch() => torch.empty(1L << 50).Dispose();

    private Task<CoServingEngine> StartAsync(string operation, Func<bool> isFull) => CoServingEngine.LoadAsync(
        _folder, new CoServingOptions { Device = new FullDevice(operation, isFull), ProfilingTimeMax = TimeSpan.Zero });

    private sealed class FullDevice(string operation, Func<bool> isFull) : ComputeDevice
    {
        internal override IComputeBackend CreateBackend() => new ProbedBackend(
            new TorchComputeBackend(new torch.Device(DeviceType.CPU), ElementsMax),
            name =>
            {
                if (name == operation && isFull())
                {
                    TakeTooMuch();
                }
            });
    }
}
