using System.Text;
using FlexLLM.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class JsonlReaderTests
{
    [TestCase("", "")]
    [TestCase("\n\r\n \t\n", "")]
    [TestCase("\uFEFF", "")]
    [TestCase("1", "1:1")]
    [TestCase("1\n", "1:1")]
    [TestCase("\uFEFF1\r\n\r\n{\"a\": [2]}\n \n\"x\"", "1:1 3:{\"a\": [2]} 5:\"x\"")]
    [TestCase("  7  \n8", "1:7 2:8")]
    public void ReadLines_AnyLineEnds_YieldsValuesWithNumbers(string text, string expected)
    {
        using JsonlReader reader = Reader(text);
        Assert.That(string.Join(' ', reader.ReadLines().Select(line => $"{line.Number}:{line.Value.GetRawText()}")),
            Is.EqualTo(expected));
    }

    [TestCase("1\n{", "line 2", "not valid JSON")]
    [TestCase("1\n\n{}{}\n", "line 3", "not valid JSON")]
    [TestCase("1\n\uFEFF2", "line 2", "not valid JSON")]
    [TestCase("{}\r{}", "line 1", "not valid JSON")]
    [TestCase("{\"a\":1,\"a\":2}", "line 1", "uplicate")]
    [TestCase("\"\\ud800\"", "line 1", "escape")]
    [TestCase("1\n12345678901234567", "line 2", "longer than 16 bytes")]
    [TestCase("1\n12345678901234567\n", "line 2", "longer than 16 bytes")]
    public void ReadLines_BrokenLine_NamesIt(string text, string field, string fault)
    {
        using JsonlReader reader = Reader(text);
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => reader.ReadLines().Count())!;
        Assert.That((e.File, e.Field), Is.EqualTo(("data.jsonl", field)));
        Assert.That(e.Fault, Does.Contain(fault));
    }

    [Test]
    public void ReadLines_InvalidUtf8_NamesTheLine()
    {
        using var reader = new JsonlReader(new MemoryStream([.. "1\n\""u8, 0xC3, .. "\"\n"u8]), "data.jsonl");
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => reader.ReadLines().Count())!;
        Assert.That((e.Field, e.Fault), Is.EqualTo(("line 2", "is not valid UTF-8")));
    }

    [TestCase("1234567890123456")]
    [TestCase("1234567890123456\n1")]
    public void ReadLines_LongestLine_Fits(string text)
    {
        using JsonlReader reader = Reader(text);
        Assert.That(reader.ReadLines().First().Value.GetRawText(), Has.Length.EqualTo(16));
    }

    [Test]
    public void ReadLines_LinesAcrossBufferEdges_ComeWhole()
    {
        string[] lines = [.. Enumerable.Range(0, 300).Select(
            i => "\"" + new string((char)('a' + (i % 26)), i * 7919 % 200_000) + "\"")];
        using var reader = new JsonlReader(new MemoryStream(Encoding.UTF8.GetBytes(string.Join('\n', lines))), "data.jsonl");
        Assert.That(reader.ReadLines().Select(line => line.Value.GetRawText()), Is.EqualTo(lines));
    }

    [Test]
    public void Open_MissingFile_IsRefused() =>
        Assert.That(() => JsonlReader.Open("/nowhere/x.jsonl"), Throws.TypeOf<InvalidFileException>());

    [Test]
    public void Open_RealDataset_ReadsEveryLine()
    {
        using JsonlReader reader = JsonlReader.Open(SharedData.Require("data", "gsm8k_test_300.jsonl"));
        Assert.That(reader.ReadLines().Count(line => line.Value.TryGetProperty("question", out _)), Is.EqualTo(300));
    }

    private static JsonlReader Reader(string text) => new(new MemoryStream(Encoding.UTF8.GetBytes(text)), "data.jsonl", 16);
}
