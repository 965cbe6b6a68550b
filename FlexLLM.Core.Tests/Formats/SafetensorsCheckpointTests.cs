using FlexLLM.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class SafetensorsCheckpointTests
{
    private TempFolder _folder = null!;

    [SetUp]
    public void SetUp() => _folder = new TempFolder();

    [TearDown]
    public void TearDown() => _folder.Dispose();

    [Test]
    public void Open_EmptyFolder_IsRefused() => AssertRefused(_folder.Path, "weights", "model.safetensors.index.json");

    [Test]
    public void Open_SingleFile_FindsItsTensors()
    {
        Shard("model.safetensors", "a", "b");
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
        Assert.That(checkpoint.Names, Is.EquivalentTo(["a", "b"]));
        Assert.That((checkpoint.Contains("a"), checkpoint.Contains("c")), Is.EqualTo((true, false)));
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => checkpoint.Get("c"))!;
        Assert.That((e.File, e.Field), Is.EqualTo((_folder["model.safetensors"], "c")));
    }

    [Test]
    public void Open_TensorNotInIndex_IsNotPartOfIt()
    {
        Shard("1.safetensors", "a", "b");
        Index("""{"weight_map":{"a":"1.safetensors"}}""");
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
        Assert.That(checkpoint.Names, Is.EquivalentTo(["a"]));
    }

    [Test]
    public void Open_TensorInTwoShards_IsRefused()
    {
        Shard("1.safetensors", "a", "b");
        Shard("2.safetensors", "c", "b");
        Index("""{"weight_map":{"a":"1.safetensors","b":"1.safetensors","c":"2.safetensors"}}""");
        AssertRefused(_folder["2.safetensors"], "b", "two shards, 1.safetensors and 2.safetensors");
    }

    [Test]
    public void Open_TensorNotInItsShard_IsRefused()
    {
        Shard("1.safetensors", "a");
        Shard("2.safetensors", "c");
        Index("""{"weight_map":{"a":"1.safetensors","c":"1.safetensors","d":"2.safetensors"}}""");
        AssertRefused(_folder[SafetensorsCheckpoint.IndexFileName], "weight_map.c", "not in its shard 1.safetensors");
    }

    [Test]
    public void Open_MalformedShard_NamesTheShard()
    {
        _folder.Write("1.safetensors", "xx");
        Index("""{"weight_map":{"a":"1.safetensors"}}""");
        AssertRefused(_folder["1.safetensors"], "header", "cut off");
    }

    [TestCase("{}", "weight_map", "is missing")]
    [TestCase("[]", "JSON", "must be an object")]
    [TestCase("{", "JSON", "not valid JSON")]
    [TestCase("""{"weight_map":["a"]}""", "weight_map", "must be an object")]
    [TestCase("""{"weight_map":{"a":1}}""", "weight_map.a", "must be a file name")]
    [TestCase("""{"weight_map":{"a":"1.safetensors","a":"1.safetensors"}}""", "JSON", "uplicate")]
    [TestCase("""{"weight_map":{"a":"none.safetensors"}}""", "weight_map", "shard none.safetensors does not exist")]
    [TestCase("""{"weight_map":{"a":"../1.safetensors"}}""", "weight_map.a", "plain name")]
    [TestCase("""{"weight_map":{"a":"/1.safetensors"}}""", "weight_map.a", "plain name")]
    [TestCase("""{"weight_map":{"a":"x\\1.safetensors"}}""", "weight_map.a", "plain name")]
    [TestCase("""{"weight_map":{"a":"c:1.safetensors"}}""", "weight_map.a", "plain name")]
    [TestCase("""{"weight_map":{"a":"\u0000.safetensors"}}""", "weight_map.a", "plain name")]
    [TestCase("""{"weight_map":{"a":".."}}""", "weight_map.a", "plain name")]
    [TestCase("""{"weight_map":{"a":""}}""", "weight_map.a", "plain name")]
    public void Open_BadIndex_NamesTheFault(string index, string field, string fault)
    {
        Index(index);
        AssertRefused(_folder[SafetensorsCheckpoint.IndexFileName], field, fault);
    }

    [Test]
    public void Open_TooManyShards_IsRefused()
    {
        IEnumerable<string> rows = Enumerable.Range(0, SafetensorsCheckpoint.ShardsMax + 1).Select(
            i => $"\"{i}\":\"{i}.safetensors\"");
        Index("{\"weight_map\":{" + string.Join(',', rows) + "}}");
        AssertRefused(_folder[SafetensorsCheckpoint.IndexFileName], "weight_map", "at most 4096");
    }

    [Test]
    public void Open_FaultInLaterShard_ClosesTheFirst()
    {
        Shard("1.safetensors", "a");
        Index("""{"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}""");
        Assert.That(() => SafetensorsCheckpoint.Open(_folder.Path), Throws.TypeOf<InvalidFileException>());
        using var exclusive = new FileStream(_folder["1.safetensors"], FileMode.Open, FileAccess.ReadWrite, FileShare.None);
        Assert.That(exclusive.Length, Is.Positive);
    }

    [Test]
    public void Dispose_ClosesEveryShard()
    {
        Shard("model.safetensors", "a");
        SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(_folder.Path);
        SafetensorsTensor tensor = checkpoint.Get("a");
        checkpoint.Dispose();
        Assert.That(() => tensor.ToFloats(), Throws.TypeOf<ObjectDisposedException>());
    }

    private void Shard(string file, params string[] names) =>
        SafetensorsWriter.Write(_folder[file], names.Select(name => TensorToWrite.FromFloats(name, [2], new float[2])));

    private void Index(string json) => _folder.Write(SafetensorsCheckpoint.IndexFileName, json);

    private void AssertRefused(string file, string field, string fault)
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => SafetensorsCheckpoint.Open(_folder.Path))!;
        Assert.That((e.File, e.Field), Is.EqualTo((file, field)));
        Assert.That(e.Fault, Does.Contain(fault));
    }
}
