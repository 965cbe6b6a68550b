using System.Buffers.Binary;
using System.Text;
using FlexLLM.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class FuzzTests
{
    private const string Lines = "\uFEFF{\"text\": \"a\\u00e9\"}\r\n\n{\"messages\": [{\"role\": \"user\", \"n\": 1}]}\n3";

    private TempFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TempFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public void Safetensors_DamagedFile_IsReadOrRefused([Range(0, 1)] int seed) =>
        Assert.That(FuzzRig.Run(seed, 500, ValidSafetensors(), bytes => ReadWhole(_folder.Write("t", bytes))), Is.Empty);

    // Most damage breaks the link between header length and JSON; here the length always fits, so that the checks behind it run.
    [Test]
    public void Safetensors_DamagedHeader_IsReadOrRefused([Range(0, 1)] int seed)
    {
        byte[] valid = ValidSafetensors();
        int length = (int)BinaryPrimitives.ReadInt64LittleEndian(valid);
        byte[] data = valid[(8 + length)..];
        int accepted = 0;
        List<string> findings = FuzzRig.Run(seed, 500, valid[8..(8 + length)], json =>
        {
            ReadWhole(_folder.Write("t", (byte[])[.. BitConverter.GetBytes((long)json.Length), .. json, .. data]));
            accepted++;
        });
        Assert.That(findings, Is.Empty);
        Assert.That(accepted, Is.InRange(2, 400), "neither all refused nor all accepted");
    }

    [Test]
    public void Index_DamagedFile_IsReadOrRefused([Range(0, 1)] int seed)
    {
        SafetensorsWriter.WriteSharded(_folder.Path, [Zeros("a", 8), Zeros("b", 8), Zeros("c", 8)], 8);
        byte[] valid = File.ReadAllBytes(_folder[SafetensorsCheckpoint.IndexFileName]);
        Assert.That(FuzzRig.Run(seed, 250, valid, bytes =>
        {
            _folder.Write(SafetensorsCheckpoint.IndexFileName, bytes);
            using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
            Assert.That(checkpoint.Names.Sum(name => checkpoint.Get(name).Bytes), Is.LessThanOrEqualTo(24));
        }), Is.Empty);
    }

    [Test]
    public void ModelConfig_DamagedFile_IsReadOrRefused([Range(0, 3)] int seed) =>
        Assert.That(FuzzRig.Run(seed, 1000, Encoding.UTF8.GetBytes(ModelConfigTests.Llama), bytes =>
        {
            ModelConfig config = ModelConfig.Parse(bytes, "config.json");
            Assert.That(config.InverseFrequencies(), Has.All.InRange(0, 1));
            Assert.That(ModelConfigTests.Parse(config.ToJson()).HeadDim, Is.EqualTo(config.HeadDim));
        }), Is.Empty);

    [Test]
    public void AdapterConfig_DamagedFile_IsReadOrRefused([Range(0, 1)] int seed) =>
        Assert.That(FuzzRig.Run(seed, 1000, Encoding.UTF8.GetBytes(AdapterConfigTests.Plain), bytes =>
            Assert.That(double.IsFinite(AdapterConfig.Parse(bytes, "adapter_config.json").Scale))), Is.Empty);

    [Test]
    public void GenerationDefaults_DamagedFile_IsReadOrRefused([Range(0, 1)] int seed) =>
        Assert.That(FuzzRig.Run(seed, 1000, Encoding.UTF8.GetBytes(GenerationDefaultsTests.Qwen), bytes =>
            GenerationDefaults.Parse(bytes, "generation_config.json")), Is.Empty);

    [Test]
    public void Jsonl_DamagedFile_IsReadOrRefused([Range(0, 1)] int seed) =>
        Assert.That(FuzzRig.Run(seed, 1000, Encoding.UTF8.GetBytes(Lines), bytes =>
        {
            using var reader = new JsonlReader(new MemoryStream(bytes), "data.jsonl", 64);
            foreach (JsonlLine line in reader.ReadLines())
            {
                Assert.That(line.Value.GetRawText(), Is.Not.Empty);
            }
        }), Is.Empty);

    // Controls: the rig must see a reader that trusts the header length, one that lets a JSON error out, one that refuses what is
    // valid, and one that hangs.
    [Test]
    public void Rig_ReaderThatTrustsTheLength_IsCaught()
    {
        List<string> findings = FuzzRig.Run(0, 500, ValidSafetensors(), bytes =>
        {
            int length = (int)BinaryPrimitives.ReadInt64LittleEndian(bytes);
            SafetensorsHeader.Parse(bytes.AsSpan(8, length), bytes.Length - 8 - length, "t");
        });
        Assert.That(findings, Has.Some.Contains("ArgumentOutOfRange"));
    }

    [Test]
    public void Rig_ReaderThatReadsRawJson_IsCaught() =>
        Assert.That(
            FuzzRig.Run(
                0, 500, Encoding.UTF8.GetBytes(ModelConfigTests.Llama), bytes => System.Text.Json.JsonElement.Parse(bytes)),
            Has.Some.Contains("JsonReaderException"));

    [Test]
    public void Rig_ReaderThatRefusesEverything_IsCaught() =>
        Assert.That(FuzzRig.Run(0, 500, ValidSafetensors(), _ => throw new InvalidFileException("t", "header", "no")),
            Has.Count.EqualTo(1));

    [Test]
    public void Rig_ReaderThatHangs_IsCaught()
    {
        using var release = new ManualResetEventSlim();
        List<string> findings = FuzzRig.Run(0, 500, ValidSafetensors(), _ => release.Wait(), TimeSpan.FromMilliseconds(50));
        Assert.That(findings, Is.EqualTo(["seed 0, case 0: does not end"]));
        release.Set();
    }

    private byte[] ValidSafetensors()
    {
        string path = _folder["valid"];
        SafetensorsWriter.Write(path, [Zeros("a", 8), TensorToWrite.FromFloats("b.weight", [2, 3], new float[6]), Zeros("c", 1)]);
        return File.ReadAllBytes(path);
    }

    private static TensorToWrite Zeros(string name, int bytes) =>
        TensorToWrite.FromBytes(name, StoredType.U8, [bytes], new byte[bytes]);

    // Touches every byte that the header admits, through every conversion.
    private static unsafe void ReadWhole(string path)
    {
        using SafetensorsFile file = SafetensorsFile.Open(path);
        int sum = 0;
        foreach (SafetensorsTensor tensor in file.Tensors.Values)
        {
            for (long i = 0; i < tensor.Bytes; i++)
            {
                sum += tensor.Data[i];
            }

            try
            {
                sum += tensor.ToFloats().Length;
                sum += tensor.AsMatrix().Rows;
                sum += tensor.ToInt64s().Length;
            }
            catch (InvalidFileException)
            {
                // The tensor is of another type.
            }
        }

        Assert.That(sum, Is.Not.Negative);
    }
}
