using System.Runtime.InteropServices;
using System.Text;
using FlexLLM.Backends.Torch;
using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>
/// Asking the driver for free memory, a GPU's name and to pin memory, on a driver that is made here: order of calls, their numbers, and
/// every failure.
/// </summary>
[TestFixture]
[NonParallelizable]
internal sealed unsafe class CudaDriverTests
{
    private static readonly long BytesFree = 78L << 30;
    private const int Gpu = 2;
    private static readonly List<string> Calls = [];
    private static string _failing = "";
    private static int _major;

    [SetUp]
    public void Forget()
    {
        Calls.Clear();
        _failing = "";
    }

    [Test]
    public void BytesFree_OfADriver_IsItsAnswerAndLeavesTheContextAsItWas()
    {
        Assert.That(CudaDriver.BytesFree(Gpu, Find), Is.EqualTo(BytesFree));
        Assert.That(Calls, Is.EqualTo(new[] { "init 0", "get 2", "retain 12", "push 112", "memory", "pop", "release 12" }));
    }

    [TestCase("init", "cuInit", false)]
    [TestCase("get", "cuDeviceGet", false)]
    [TestCase("retain", "cuDevicePrimaryCtxRetain", false)]
    [TestCase("push", "cuCtxPushCurrent_v2", true)]
    [TestCase("memory", "cuMemGetInfo_v2", true)]
    [TestCase("pop", "cuCtxPopCurrent_v2", true)]
    public void BytesFree_CallThatFails_SaysWhichAndWhatToSet(string failing, string call, bool releases)
    {
        _failing = failing;
        FlexLlmException? error = Assert.Throws<FlexLlmException>(() => CudaDriver.BytesFree(Gpu, Find));
        Assert.That(
            error!.Message, Does.Contain($"{call} of").And.Contain("error 999").And.Contain("cuda:2").And.Contain("DeviceBytesMax"));
        Assert.That(Calls.Contains("release 12"), Is.EqualTo(releases));
        Assert.That(Calls.Contains("pop"), Is.EqualTo(failing is "memory" or "pop"), "What was pushed is popped.");
    }

    [Test]
    public void BytesFree_DriverWithoutTheFunction_SaysWhatToSet() => Assert.That(
        () => CudaDriver.BytesFree(0, name => name == "cuMemGetInfo_v2" ? 0 : Find(name)),
        Throws.TypeOf<FlexLlmException>().With.Message.Contains("no cuMemGetInfo_v2").And.Message.Contains("DeviceBytesMax"));

    [Test]
    public void BytesFree_WithoutADriver_SaysWhatToSet()
    {
        if (NativeLibrary.TryLoad("libcuda.so.1", out _) || NativeLibrary.TryLoad("nvcuda.dll", out _))
        {
            Assert.Ignore("A driver is present.");
        }

        Assert.That(
            () => CudaDriver.BytesFree(0),
            Throws.TypeOf<FlexLlmException>().With.Message.Contains("is not there").And.Message.Contains("DeviceBytesMax"));
    }

    [Test]
    public void NameOf_OfADriver_IsItsAnswer()
    {
        Assert.That(CudaDriver.NameOf(Gpu, Find), Is.EqualTo("Test GPU 12"));
        Assert.That(Calls, Is.EqualTo(new[] { "init 0", "get 2", "name 12" }));
    }

    // A name is worth no failure: profiles are then told apart by the GPU's number alone.
    [TestCase("init")]
    [TestCase("get")]
    [TestCase("name")]
    public void NameOf_CallThatFails_IsNull(string failing)
    {
        _failing = failing;
        Assert.That(CudaDriver.NameOf(Gpu, Find), Is.Null);
    }

    [Test]
    public void NameOf_DriverWithoutTheFunction_IsNull() =>
        Assert.That(CudaDriver.NameOf(Gpu, name => name == "cuDeviceGetName" ? 0 : Find(name)), Is.Null);

    [TestCase(7, false)]
    [TestCase(8, true)]
    [TestCase(12, true)]
    public void MultipliesBf16_OfADriver_IsThatOfItsCapability(int major, bool multiplies)
    {
        _major = major;
        Assert.That(CudaDriver.MultipliesBf16(Gpu, Find), Is.EqualTo(multiplies));
        Assert.That(Calls, Is.EqualTo(new[] { "init 0", "get 2", "attribute 75 12" }));
    }

    [TestCase("init")]
    [TestCase("get")]
    [TestCase("attribute")]
    public void MultipliesBf16_CallThatFails_IsTrue(string failing)
    {
        (_major, _failing) = (7, failing);
        Assert.That(CudaDriver.MultipliesBf16(Gpu, Find), Is.True);
        Assert.That(CudaDriver.MultipliesBf16(Gpu, name => name == "cuDeviceGetAttribute" ? 0 : Find(name)), Is.True);
    }

    [Test]
    public void Pin_OfADriver_LastsUntilItIsDisposedAndHoldsTheContext()
    {
        IDisposable? pin = CudaDriver.Pin(Gpu, address: 4096, bytes: 64, Find);
        Assert.That(pin, Is.Not.Null);
        Assert.That(
            Calls, Is.EqualTo(new[] { "init 0", "get 2", "retain 12", "push 112", "register 4096 64 1", "pop" }),
            "The driver forgets what is pinned when nobody holds the context any more.");
        pin!.Dispose();
        Assert.That(
            Calls.Skip(6),
            Is.EqualTo(new[] { "init 0", "get 2", "retain 12", "push 112", "unregister 4096", "pop", "release 12", "release 12" }));
    }

    // Copies are slower then, which is worth no failure.
    [TestCase("init")]
    [TestCase("push")]
    [TestCase("register")]
    public void Pin_CallThatFails_IsNull(string failing)
    {
        _failing = failing;
        Assert.That(CudaDriver.Pin(Gpu, 4096, 64, Find), Is.Null);
        Assert.That(Calls.Count(c => c == "release 12"), Is.EqualTo(Calls.Count(c => c == "retain 12")));
    }

    [Test]
    public void Pin_DriverWithoutTheFunction_IsNull() =>
        Assert.That(CudaDriver.Pin(Gpu, 4096, 64, name => name == "cuMemHostRegister_v2" ? 0 : Find(name)), Is.Null);

    private static nint Find(string name) => name switch
    {
        "cuInit" => (nint)(delegate* unmanaged<uint, int>)&Initialize,
        "cuDeviceGet" => (nint)(delegate* unmanaged<int*, int, int>)&DeviceOf,
        "cuDeviceGetName" => (nint)(delegate* unmanaged<byte*, int, int, int>)&NameOfDevice,
        "cuDeviceGetAttribute" => (nint)(delegate* unmanaged<int*, int, int, int>)&AttributeOf,
        "cuDevicePrimaryCtxRetain" => (nint)(delegate* unmanaged<nint*, int, int>)&Retain,
        "cuDevicePrimaryCtxRelease_v2" => (nint)(delegate* unmanaged<int, int>)&Release,
        "cuCtxPushCurrent_v2" => (nint)(delegate* unmanaged<nint, int>)&Push,
        "cuCtxPopCurrent_v2" => (nint)(delegate* unmanaged<nint*, int>)&Pop,
        "cuMemGetInfo_v2" => (nint)(delegate* unmanaged<nuint*, nuint*, int>)&Memory,
        "cuMemHostRegister_v2" => (nint)(delegate* unmanaged<nint, nuint, uint, int>)&Register,
        "cuMemHostUnregister" => (nint)(delegate* unmanaged<nint, int>)&Unregister,
        _ => 0,
    };

    private static int Called(FormattableString call)
    {
        string text = FormattableString.Invariant(call);
        Calls.Add(text);
        return text.Split(' ')[0] == _failing ? 999 : 0;
    }

    [UnmanagedCallersOnly]
    private static int Initialize(uint flags) => Called($"init {flags}");

    [UnmanagedCallersOnly]
    private static int DeviceOf(int* device, int ordinal)
    {
        *device = ordinal + 10;
        return Called($"get {ordinal}");
    }

    [UnmanagedCallersOnly]
    private static int NameOfDevice(byte* name, int length, int device)
    {
        byte[] text = Encoding.UTF8.GetBytes($"Test GPU {device}\0");
        text.CopyTo(new Span<byte>(name, length));
        return Called($"name {device}");
    }

    [UnmanagedCallersOnly]
    private static int AttributeOf(int* value, int attribute, int device)
    {
        *value = _major;
        return Called($"attribute {attribute} {device}");
    }

    [UnmanagedCallersOnly]
    private static int Retain(nint* context, int device)
    {
        *context = device + 100;
        return Called($"retain {device}");
    }

    [UnmanagedCallersOnly]
    private static int Release(int device) => Called($"release {device}");

    [UnmanagedCallersOnly]
    private static int Push(nint context) => Called($"push {context}");

    [UnmanagedCallersOnly]
    private static int Pop(nint* context)
    {
        *context = 0;
        return Called($"pop");
    }

    [UnmanagedCallersOnly]
    private static int Memory(nuint* free, nuint* total)
    {
        (*free, *total) = ((nuint)BytesFree, (nuint)(2 * BytesFree));
        return Called($"memory");
    }

    [UnmanagedCallersOnly]
    private static int Register(nint address, nuint bytes, uint flags) => Called($"register {address} {bytes} {flags}");

    [UnmanagedCallersOnly]
    private static int Unregister(nint address) => Called($"unregister {address}");
}
