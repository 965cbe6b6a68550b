using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Tests.Contracts;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>Where no limit is set, a device with memory of its own says how much there is.</summary>
[TestFixture]
internal sealed class DeviceMemoryTests
{
    private TinyModel _model = null!;

    [OneTimeSetUp]
    public void SetUp() => _model = new TinyModel(ModelArchitecture.Qwen3);

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public async Task DeviceBytesMax_NotSet_IsNineTenthsOfWhatTheDeviceHasFree()
    {
        long limit = await LimitAsync(() => 400L << 20, options: null);
        Assert.That(limit, Is.EqualTo((long)((400L << 20) * 0.9)));
    }

    [Test]
    public async Task DeviceBytesMax_DeviceWithoutMemoryOfItsOwn_IsTheProcess()
    {
        long limit = await LimitAsync(() => null, options: null);
        Assert.That(limit, Is.EqualTo((long)(GC.GetGCMemoryInfo().TotalAvailableMemoryBytes * 0.9)));
    }

    [Test]
    public async Task DeviceBytesMax_Set_CountsAndNobodyIsAsked()
    {
        long limit = await LimitAsync(
            () => throw new FlexLlmException("Not to be told."), new CoServingOptions { DeviceBytesMax = 300L << 20 });
        Assert.That(limit, Is.EqualTo(300L << 20));
    }

    [Test]
    public async Task LoadAsync_DeviceThatDoesNotTell_FailsWithItsMessageAndHoldsNothing()
    {
        var device = new SizedDevice(() => throw new FlexLlmException("Set CoServingOptions.DeviceBytesMax."));
        Exception? fault = await CoServingEngine.LoadAsync(_model.Folder, new CoServingOptions { Device = device }).FaultAsync();
        Assert.That(fault, Is.TypeOf<FlexLlmException>().With.Message.Contains("DeviceBytesMax"));
        Assert.That(device.Backend!.AllocatedBytes, Is.Zero);
    }

    [Test]
    public async Task LoadAsync_CheckpointLargerThanTheDevice_IsRefusedWithATableAndHoldsNothing()
    {
        var device = new SizedDevice(() => 20_000);
        Exception? fault = await CoServingEngine.LoadAsync(_model.Folder, new CoServingOptions { Device = device }).FaultAsync();
        Assert.That(fault, Is.TypeOf<RequestRejectedException>().With.Message.Contains("does not fit").And.Message.Contains("matrices"));
        Assert.That(device.Backend!.AllocatedBytes, Is.Zero);
    }

    private async Task<long> LimitAsync(Func<long?> memory, CoServingOptions? options)
    {
        await using CoServingEngine engine = await _model.StartAsync(options, new SizedDevice(memory));
        await engine.AskAsync(Answers.Mixed(1, maxTokens: 4)[0]);
        return (await engine.GetStatisticsAsync().Soon()).DeviceBytesMax;
    }

    private sealed class SizedDevice(Func<long?> memory) : ComputeDevice
    {
        public IComputeBackend? Backend { get; private set; }

        internal override IComputeBackend CreateBackend() => Backend = new SizedBackend(new CpuBackend(1), memory);
    }

    private sealed class SizedBackend(IComputeBackend inner, Func<long?> memory) : DelegatingBackend(inner)
    {
        public override long? MemoryBytes => memory();
    }
}
