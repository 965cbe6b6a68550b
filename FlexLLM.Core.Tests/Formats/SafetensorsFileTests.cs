using System.Buffers.Binary;
using System.Text;
using FlexLLM.Formats;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class SafetensorsFileTests
{
    private TempFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TempFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public void Open_HandMadeFile_ReadsEveryField()
    {
        string path = Write("""
            {"b":{"dtype":"F32","shape":[2,1],"data_offsets":[8,16]},"__metadata__":{"format":"pt"},
             "a":{"dtype":"I32","shape":[2],"data_offsets":[0,8],"extra":1}}
            """, [.. Bytes(7), .. Bytes(-1), .. Bytes(0x3F800000), .. Bytes(unchecked((int)0xC0000000))]);

        using SafetensorsFile file = SafetensorsFile.Open(path);

        Assert.That(file.Tensors.Keys, Is.EquivalentTo(["a", "b"]));
        Assert.That(file.Metadata, Is.EqualTo(new Dictionary<string, string> { ["format"] = "pt" }));
        Assert.That(file.Get("a").ToInt64s(), Is.EqualTo([7L, -1]));
        Assert.That(file.Get("b").ToFloats(), Is.EqualTo([1f, -2f]));
        Assert.That(file.Get("b").Shape, Is.EqualTo([2L, 1]));
        Assert.That((file.Get("b").Type, file.Get("b").Count, file.Get("b").Bytes), Is.EqualTo((StoredType.F32, 2L, 8L)));
        Assert.That(file.Get("b").AsBytes().ToArray(), Is.EqualTo(new byte[] { 0, 0, 0x80, 0x3F, 0, 0, 0, 0xC0 }));
    }

    [Test]
    public void Open_NoTensors_IsEmpty()
    {
        using SafetensorsFile file = SafetensorsFile.Open(Write("{}  ", []));
        Assert.That(file.Tensors, Is.Empty);
    }

    [Test]
    public void Open_EmptyTensorAndScalar_HaveTheirCounts()
    {
        string path = Write(
            """{"e":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]},"s":{"dtype":"F64","shape":[],"data_offsets":[0,8]}}""",
            BitConverter.GetBytes(2.5));
        using SafetensorsFile file = SafetensorsFile.Open(path);
        Assert.That(file.Get("e").ToFloats(), Is.Empty);
        Assert.That(file.Get("e").AsMatrix().Columns, Is.EqualTo(5));
        Assert.That(file.Get("s").ToDoubles(), Is.EqualTo([2.5]));
    }

    [Test]
    public void Open_EveryKnownType_HasItsSize()
    {
        foreach (StoredType type in Enum.GetValues<StoredType>())
        {
            int bytes = StoredTypes.BytesOf(type);
            string path = Write(
                $$$"""{"t":{"dtype":"{{{StoredTypes.NameOf(type)}}}","shape":[3],"data_offsets":[0,{{{3 * bytes}}}]}}""",
                new byte[3 * bytes]);
            using SafetensorsFile file = SafetensorsFile.Open(path);
            Assert.That(file.Get("t").Type, Is.EqualTo(type));
        }
    }

    // Arguments: field named in the error, a part of its text, header, data bytes after it.
    [TestCase("header", "must begin with '{'", "", 0)]
    [TestCase("header", "must begin with '{'", " {}", 0)]
    [TestCase("header", "must begin with '{'", "[]", 0)]
    [TestCase("header", "not valid JSON", "{", 0)]
    [TestCase("header", "not valid JSON", "{} x", 0)]
    [TestCase("header", "uplicate",
        """{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}""", 2)]
    [TestCase("header", "uplicate",
        """{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1]},"\u0061":{"dtype":"U8","shape":[],"data_offsets":[1,2]}}""", 2)]
    [TestCase("header", "uplicate", """{"a":{"dtype":"U8","dtype":"U8","shape":[],"data_offsets":[0,1]}}""", 1)]
    [TestCase("header", "escape", """{"\ud800":{"dtype":"U8","shape":[],"data_offsets":[0,1]}}""", 1)]
    [TestCase("__metadata__", "must be an object", """{"__metadata__":[]}""", 0)]
    [TestCase("__metadata__", "'k' must be a string", """{"__metadata__":{"k":1}}""", 0)]
    [TestCase("__metadata__", "'k' must be a string", """{"__metadata__":{"k":null}}""", 0)]
    [TestCase("a", "must be an object", """{"a":3}""", 0)]
    [TestCase("a", "dtype is missing", """{"a":{"shape":[],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "dtype must be a string", """{"a":{"dtype":5,"shape":[],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "dtype 'F4' is not known", """{"a":{"dtype":"F4","shape":[],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "shape is missing", """{"a":{"dtype":"U8","data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "shape must be a list", """{"a":{"dtype":"U8","shape":1,"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "shape[1] must be", """{"a":{"dtype":"U8","shape":[1,-1],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "shape[0] must be", """{"a":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "shape[0] must be", """{"a":{"dtype":"U8","shape":["1"],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "shape[0] must be", """{"a":{"dtype":"U8","shape":[9223372036854775808],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "overflows", """{"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}}""", 0)]
    [TestCase("a", "overflows", """{"a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}}""", 0)]
    [TestCase("a", "at most 16", """{"a":{"dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,1]}}""", 1)]
    [TestCase("a", "data_offsets is missing", """{"a":{"dtype":"U8","shape":[]}}""", 0)]
    [TestCase("a", "two numbers", """{"a":{"dtype":"U8","shape":[],"data_offsets":[0]}}""", 1)]
    [TestCase("a", "at most 2", """{"a":{"dtype":"U8","shape":[],"data_offsets":[0,1,2]}}""", 2)]
    [TestCase("a", "data_offsets[0] must be", """{"a":{"dtype":"U8","shape":[],"data_offsets":[-1,0]}}""", 0)]
    [TestCase("a", "reversed", """{"a":{"dtype":"U8","shape":[],"data_offsets":[1,0]}}""", 1)]
    [TestCase("a", "only 1 data bytes", """{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}""", 1)]
    [TestCase("a", "takes 8 bytes, but data_offsets span 4", """{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}""", 4)]
    [TestCase("b", "overlaps",
        """{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}""", 3)]
    [TestCase("b", "hole",
        """{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}""", 3)]
    [TestCase("a", "hole", """{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}""", 2)]
    [TestCase("header", "covers 1 data bytes, but 3 follow", """{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}""", 3)]
    public void Open_BadHeader_NamesTheFault(string field, string fault, string header, int dataBytes)
    {
        string path = Write(header, new byte[dataBytes]);
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => SafetensorsFile.Open(path))!;
        Assert.That((e.File, e.Field), Is.EqualTo((path, field)));
        Assert.That(e.Fault, Does.Contain(fault));
    }

    [Test]
    public void Open_InvalidUtf8_IsRefused()
    {
        string path = _folder.Write("t", (byte[])[5, 0, 0, 0, 0, 0, 0, 0, .. "{\""u8, 0xFF, .. "\"}"u8]);
        Assert.That(() => SafetensorsFile.Open(path), Throws.TypeOf<InvalidFileException>().With.Message.Contains("UTF-8"));
    }

    [Test]
    public void Open_TooDeep_IsRefused()
    {
        string path = Write($$"""{"a":{{new string('[', 100)}}{{new string(']', 100)}}}""", []);
        Assert.That(() => SafetensorsFile.Open(path), Throws.TypeOf<InvalidFileException>().With.Message.Contains("depth"));
    }

    [TestCase(0)]
    [TestCase(7)]
    public void Open_ShorterThanItsLength_IsRefused(int bytes)
    {
        string path = _folder.Write("t", new byte[bytes]);
        Assert.That(() => SafetensorsFile.Open(path), Throws.TypeOf<InvalidFileException>().With.Message.Contains("cut off"));
    }

    [TestCase(3UL, "only 2 follow")]
    [TestCase((100UL << 20) + 1, "at most 104857600")]
    [TestCase(ulong.MaxValue, "at most 104857600")]
    [TestCase(1UL << 63, "at most 104857600")]
    public void Open_HeaderLengthLies_IsRefused(ulong length, string fault)
    {
        byte[] bytes = [.. new byte[8], .. "{}"u8];
        BinaryPrimitives.WriteUInt64LittleEndian(bytes, length);
        string path = _folder.Write("t", bytes);
        Assert.That(() => SafetensorsFile.Open(path), Throws.TypeOf<InvalidFileException>().With.Message.Contains(fault));
    }

    [Test]
    public void Open_MissingFile_IsRefused() =>
        Assert.That(
            () => SafetensorsFile.Open(_folder["none"]), Throws.TypeOf<InvalidFileException>().With.Message.Contains("exist"));

    [Test]
    public void Get_MissingTensor_NamesIt()
    {
        using SafetensorsFile file = SafetensorsFile.Open(Write("{}", []));
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => file.Get("w"))!;
        Assert.That((e.Field, e.Fault), Is.EqualTo(("w", "tensor is missing")));
    }

    [Test]
    public unsafe void Tensor_AfterDispose_Throws()
    {
        SafetensorsFile file = SafetensorsFile.Open(
            Write("""{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}""", new byte[4]));
        SafetensorsTensor tensor = file.Get("a");
        file.Dispose();
        file.Dispose();
        Assert.That(() => (nint)tensor.Data, Throws.TypeOf<ObjectDisposedException>());
        Assert.That(() => tensor.AsMatrix(), Throws.TypeOf<ObjectDisposedException>());
        Assert.That(() => tensor.ToFloats(), Throws.TypeOf<ObjectDisposedException>());
    }

    [Test]
    public void AsMatrix_VectorAndMatrix_HaveTheirSides()
    {
        using SafetensorsFile file = SafetensorsFile.Open(Write(
            """
            {"m":{"dtype":"BF16","shape":[2,3],"data_offsets":[0,12]},
             "v":{"dtype":"F16","shape":[3],"data_offsets":[12,18]}}
            """,
            [.. Halves(0x3F80, 0, 0, 0, 0, 0xC040), .. Halves(0x3C00, 0xC000, 0x7C00)]));
        HostMatrix matrix = file.Get("m").AsMatrix();
        HostMatrix vector = file.Get("v").AsMatrix();
        Assert.That((matrix.Type, matrix.Rows, matrix.Columns), Is.EqualTo((DType.BF16, 2, 3)));
        Assert.That((matrix[0, 0], matrix[1, 2]), Is.EqualTo((1f, -3f)));
        Assert.That((vector.Type, vector.Rows, vector.Columns), Is.EqualTo((DType.F16, 1, 3)));
        Assert.That(file.Get("v").ToFloats(), Is.EqualTo([1f, -2f, float.PositiveInfinity]));
        Assert.That(file.Get("m").ToDoubles(), Is.EqualTo([1.0, 0, 0, 0, 0, -3]));
    }

    [Test]
    public void Conversions_WrongTypeOrRank_AreRefused()
    {
        using SafetensorsFile file = SafetensorsFile.Open(Write("""
            {"i":{"dtype":"I64","shape":[1],"data_offsets":[0,8]},"s":{"dtype":"F32","shape":[],"data_offsets":[8,12]},
             "c":{"dtype":"F32","shape":[1,1,1],"data_offsets":[12,16]},
             "h":{"dtype":"F32","shape":[0,2147483648],"data_offsets":[16,16]}}
            """, new byte[16]));
        Assert.That(() => file.Get("i").AsMatrix(), Throws.TypeOf<InvalidFileException>().With.Message.Contains("stored as I64"));
        Assert.That(() => file.Get("i").ToFloats(), Throws.TypeOf<InvalidFileException>().With.Message.Contains("stored as I64"));
        Assert.That(() => file.Get("s").ToInt64s(), Throws.TypeOf<InvalidFileException>().With.Message.Contains("stored as F32"));
        Assert.That(() => file.Get("s").AsMatrix(), Throws.TypeOf<InvalidFileException>().With.Message.Contains("shape []"));
        Assert.That(
            () => file.Get("c").AsMatrix(), Throws.TypeOf<InvalidFileException>().With.Message.Contains("shape [1, 1, 1]"));
        Assert.That(() => file.Get("h").AsMatrix(), Throws.TypeOf<InvalidFileException>().With.Message.Contains("too large"));
    }

    private string Write(string header, byte[] data)
    {
        byte[] json = Encoding.UTF8.GetBytes(header);
        return _folder.Write("t.safetensors", (byte[])[.. BitConverter.GetBytes((ulong)json.Length), .. json, .. data]);
    }

    private static byte[] Bytes(int value) => BitConverter.GetBytes(value);

    private static byte[] Halves(params ushort[] values) => [.. values.SelectMany(BitConverter.GetBytes)];
}
