using System.Runtime.InteropServices;
using System.Text.Json;
using FlexLLM.Formats;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class SafetensorsWriterTests
{
    private TempFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TempFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public void Write_RandomTensors_ReadBackBitForBit([Range(0, 19)] int seed)
    {
        var random = new SeededRandom((ulong)seed);
        List<TensorToWrite> tensors = RandomTensors(ref random, random.Next(12), out Dictionary<string, byte[]> data);
        string path = _folder["t.safetensors"];

        SafetensorsWriter.Write(path, tensors, new Dictionary<string, string> { ["k"] = "v \u00e9\"" });

        using SafetensorsFile file = SafetensorsFile.Open(path);
        Assert.That(file.Metadata["k"], Is.EqualTo("v \u00e9\""));
        Assert.That(file.Tensors.Keys, Is.EquivalentTo(data.Keys));
        foreach (TensorToWrite written in tensors)
        {
            SafetensorsTensor read = file.Get(written.Name);
            Assert.That(read.Type, Is.EqualTo(written.Type));
            Assert.That(read.Shape, Is.EqualTo(written.Shape));
            Assert.That(read.AsBytes().SequenceEqual(data[written.Name]));
        }

        Assert.That(Directory.GetFiles(_folder.Path), Has.Length.EqualTo(1));
    }

    [Test]
    public unsafe void Write_MixedSizes_AlignsEveryTensor()
    {
        string path = _folder["t.safetensors"];
        SafetensorsWriter.Write(path, [Zeros("a", StoredType.U8, 3), Zeros("b", StoredType.F64, 1),
            Zeros("c", StoredType.BF16, 3), Zeros("d", StoredType.F32, 1)]);
        using SafetensorsFile file = SafetensorsFile.Open(path);
        Assert.That(file.Tensors.Values.All(tensor => (nint)tensor.Data % StoredTypes.BytesOf(tensor.Type) == 0));
        Assert.That(file.Metadata["format"], Is.EqualTo("pt"));
        Assert.That(BitConverter.ToInt64(File.ReadAllBytes(path)) % 8, Is.Zero);
    }

    [TestCase(3)]
    [TestCase(5)]
    public void Write_CallbackOfWrongLength_LeavesTheOldFile(int bytes)
    {
        string path = _folder.Write("t.safetensors", "old");
        var tensor = new TensorToWrite("a", StoredType.F32, [1], stream => stream.Write(new byte[bytes]));
        Assert.That(() => SafetensorsWriter.Write(path, [tensor]), Throws.ArgumentException
            .With.Message.Contains($"wrote {bytes} bytes instead of 4"));
        Assert.That(File.ReadAllText(path), Is.EqualTo("old"));
        Assert.That(Directory.GetFiles(_folder.Path), Is.EqualTo([path]));
    }

    [Test]
    public void Write_BesideAnotherWriter_FailsAndLeavesItAlone()
    {
        string path = _folder["t.safetensors"];
        using (var other = new FileStream(path + ".tmp", FileMode.Create, FileAccess.Write, FileShare.None))
        {
            Assert.That(() => SafetensorsWriter.Write(path, []), Throws.InstanceOf<IOException>());
            Assert.That(File.Exists(path + ".tmp"));
        }
    }

    [Test]
    public void Write_BadNamesOrShapes_AreRefused()
    {
        Assert.That(() => SafetensorsWriter.Write(_folder["t"], [Zeros("a", StoredType.U8, 1), Zeros("a", StoredType.U8, 1)]),
            Throws.ArgumentException);
        Assert.That(
            () => SafetensorsWriter.Write(_folder["t"], [Zeros("__metadata__", StoredType.U8, 1)]), Throws.ArgumentException);
        Assert.That(
            () => SafetensorsWriter.Write(_folder["t"], [new TensorToWrite("a", StoredType.U8, [-1], _ => { })]),
                Throws.ArgumentException);
        Assert.That(Directory.GetFiles(_folder.Path), Is.Empty);
    }

    [Test]
    public void Write_LargeTensor_IsStreamed()
    {
        const int Rows = 256;
        byte[] row = new byte[1 << 16];
        var tensor = new TensorToWrite("a", StoredType.U8, [Rows, row.Length], stream =>
        {
            for (int i = 0; i < Rows; i++)
            {
                stream.Write(row);
            }
        });
        long before = GC.GetAllocatedBytesForCurrentThread();
        SafetensorsWriter.Write(_folder["t"], [tensor]);
        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.LessThan(tensor.Bytes / 16));
    }

    [Test]
    public void WriteSharded_RandomTensors_ReadBackThroughTheIndex([Range(0, 4)] int seed)
    {
        var random = new SeededRandom((ulong)seed);
        List<TensorToWrite> tensors = RandomTensors(ref random, 60, out Dictionary<string, byte[]> data);
        SafetensorsWriter.WriteSharded(_folder.Path, tensors, tensors.Sum(tensor => tensor.Bytes) / 4);

        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
        Assert.That(checkpoint.Names, Is.EquivalentTo(data.Keys));
        foreach ((string name, byte[] bytes) in data)
        {
            Assert.That(checkpoint.Get(name).AsBytes().SequenceEqual(bytes));
        }

        JsonElement index = JsonElement.Parse(File.ReadAllBytes(_folder[SafetensorsCheckpoint.IndexFileName]));
        Assert.That(index.GetProperty("metadata").GetProperty("total_size").GetInt64(),
            Is.EqualTo(data.Values.Sum(bytes => bytes.LongLength)));
    }

    [Test]
    public void WriteSharded_KnownSizes_NamesShardsAsTransformersDoes()
    {
        TensorToWrite[] tensors = [Zeros("a", StoredType.U8, 6), Zeros("b", StoredType.U8, 4), Zeros("c", StoredType.U8, 1),
            Zeros("d", StoredType.U8, 30)];
        SafetensorsWriter.WriteSharded(_folder.Path, tensors, 10);
        Assert.That(File.ReadAllText(_folder[SafetensorsCheckpoint.IndexFileName]), Is.EqualTo("""
            {
              "metadata": {
                "total_size": 41
              },
              "weight_map": {
                "a": "model-00001-of-00003.safetensors",
                "b": "model-00001-of-00003.safetensors",
                "c": "model-00002-of-00003.safetensors",
                "d": "model-00003-of-00003.safetensors"
              }
            }

            """));
    }

    [Test]
    public void WriteSharded_FitsOneShard_WritesTheSingleFile()
    {
        SafetensorsWriter.WriteSharded(_folder.Path, [Zeros("a", StoredType.U8, 6)], 10);
        Assert.That(Directory.GetFiles(_folder.Path), Is.EqualTo([_folder["model.safetensors"]]));
    }

    [Test]
    public void WriteSharded_OtherFormPresent_IsRefused()
    {
        TensorToWrite[] tensors = [Zeros("a", StoredType.U8, 6), Zeros("b", StoredType.U8, 6)];
        SafetensorsWriter.WriteSharded(_folder.Path, tensors, 100);
        Assert.That(() => SafetensorsWriter.WriteSharded(_folder.Path, tensors, 6), Throws.TypeOf<IOException>());
    }

    private static List<TensorToWrite> RandomTensors(ref SeededRandom random, int count, out Dictionary<string, byte[]> data)
    {
        data = [];
        var tensors = new List<TensorToWrite>();
        for (int i = 0; i < count; i++)
        {
            var type = (StoredType)random.Next(Enum.GetValues<StoredType>().Length);
            var shape = new long[random.Next(4)];
            for (int axis = 0; axis < shape.Length; axis++)
            {
                shape[axis] = random.Next(6);
            }

            var bytes = new byte[shape.Aggregate(1L, (product, size) => product * size) * StoredTypes.BytesOf(type)];
            foreach (ref byte value in bytes.AsSpan())
            {
                value = (byte)random.Next(256);
            }

            string name = $"layers.{i}.weight";
            data[name] = bytes;
            tensors.Add(TensorToWrite.FromBytes(name, type, shape, bytes));
        }

        return tensors;
    }

    [Test]
    public void FromFloats_ReadsBackAsFloats()
    {
        float[] values = [1.5f, float.NaN, -0f, float.Epsilon];
        SafetensorsWriter.Write(_folder["t"], [TensorToWrite.FromFloats("x", [2, 2], values)]);
        using SafetensorsFile file = SafetensorsFile.Open(_folder["t"]);
        Assert.That(file.Get("x").ToFloats().Select(BitConverter.SingleToUInt32Bits),
            Is.EqualTo(values.Select(BitConverter.SingleToUInt32Bits)));
        Assert.That(MemoryMarshal.Cast<byte, float>(file.Get("x").AsBytes()).Length, Is.EqualTo(4));
    }

    private static TensorToWrite Zeros(string name, StoredType type, int count) =>
        TensorToWrite.FromBytes(name, type, [count], new byte[count * StoredTypes.BytesOf(type)]);
}
