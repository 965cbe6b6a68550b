using System.Text;
using FlexLLM.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class GenerationDefaultsTests
{
    internal const string Qwen = """
        {"bos_token_id":151643,"pad_token_id":151643,"do_sample":true,"eos_token_id":[151645,151643],"repetition_penalty":1.1,
         "temperature":0.7,"top_p":0.8,"top_k":20,"min_p":0.05,"max_new_tokens":2048,"max_length":20,
         "transformers_version":"4.37.0"}
        """;

    [Test]
    public void Parse_EveryField_IsRead()
    {
        GenerationDefaults read = Parse(Qwen);
        Assert.That(read.EosTokenIds, Is.EqualTo([151645, 151643]));
        Assert.That(read with { EosTokenIds = null }, Is.EqualTo(new GenerationDefaults
        {
            BosTokenId = 151643,
            PadTokenId = 151643,
            DoSample = true,
            Temperature = 0.7,
            TopK = 20,
            TopP = 0.8,
            MinP = 0.05,
            RepetitionPenalty = 1.1,
            MaxNewTokens = 2048,
            MaxLength = 20,
        }));
    }

    [Test]
    public void Parse_SingleEosAndNoPad_AreUnderstood()
    {
        GenerationDefaults read = Parse("""{"eos_token_id":2,"pad_token_id":-1,"top_k":null}""");
        Assert.That(read.EosTokenIds, Is.EqualTo([2]));
        Assert.That((read.PadTokenId, read.TopK), Is.EqualTo((default(int?), default(int?))));
    }

    [Test]
    public void Load_NoFile_HasNoDefaults()
    {
        using var folder = new TempFolder();
        Assert.That(GenerationDefaults.Load(folder.Path), Is.EqualTo(new GenerationDefaults()));
        folder.Write("generation_config.json", Qwen);
        Assert.That(GenerationDefaults.Load(folder.Path).TopK, Is.EqualTo(20));
    }

    [TestCase("[]", "JSON")]
    [TestCase("""{"eos_token_id":"</s>"}""", "eos_token_id")]
    [TestCase("""{"eos_token_id":[1.5]}""", "eos_token_id[0]")]
    [TestCase("""{"bos_token_id":[1]}""", "bos_token_id")]
    [TestCase("""{"pad_token_id":-2}""", "pad_token_id")]
    [TestCase("""{"do_sample":1}""", "do_sample")]
    [TestCase("""{"temperature":"0.7"}""", "temperature")]
    [TestCase("""{"temperature":-1}""", "temperature")]
    [TestCase("""{"temperature":1e999}""", "temperature")]
    [TestCase("""{"top_k":2.5}""", "top_k")]
    [TestCase("""{"top_k":-1}""", "top_k")]
    [TestCase("""{"top_p":1.5}""", "top_p")]
    [TestCase("""{"min_p":-0.1}""", "min_p")]
    [TestCase("""{"repetition_penalty":0}""", "repetition_penalty")]
    [TestCase("""{"max_new_tokens":0}""", "max_new_tokens")]
    [TestCase("""{"max_length":{}}""", "max_length")]
    public void Parse_BadField_NamesIt(string json, string field)
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => Parse(json))!;
        Assert.That((e.File, e.Field), Is.EqualTo(("generation_config.json", field)));
    }

    private static GenerationDefaults Parse(string json) =>
        GenerationDefaults.Parse(Encoding.UTF8.GetBytes(json), "generation_config.json");
}
