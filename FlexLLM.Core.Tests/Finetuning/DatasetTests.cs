using FlexLLM.Finetuning;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>From lines of JSON to token ids and targets.</summary>
[TestFixture]
internal sealed class DatasetTests
{
    private const int End = 258; // <|im_end|>
    private const int Start = 257; // <|im_start|>

    private TinyModel _model = null!;
    private Tokenizer _tokenizer = null!;
    private int _files;

    [OneTimeSetUp]
    public void SetUp()
    {
        _model = new TinyModel(ModelArchitecture.Llama, withTokenizer: true);
        _tokenizer = Tokenizer.Load(_model.Folder);
    }

    [OneTimeTearDown]
    public void TearDown() => _model.Dispose();

    [Test]
    public void Build_Text_AsksForEveryTokenAndTheEnd()
    {
        TrainingSample sample = Only("""{"text": "abc"}""");
        Assert.That(sample.Ids, Is.EqualTo(new[] { 'a', 'b', 'c', End }));
        Assert.That(sample.Targets, Is.EqualTo(new[] { 'b', 'c', End, -1 }));
    }

    [Test]
    public void Build_Completion_AsksForTheCompletionAlone()
    {
        TrainingSample sample = Only("""{"prompt": "ab", "completion": "cd"}""");
        Assert.That(sample.Ids, Is.EqualTo(new[] { 'a', 'b', 'c', 'd', End }));
        Assert.That(sample.Targets, Is.EqualTo(new[] { -1, 'c', 'd', End, -1 }));
        Assert.That(sample.TargetCount, Is.EqualTo(3));
    }

    [Test]
    public void Build_CompletionWithoutPrompt_CannotAskForItsFirstToken()
    {
        TrainingSample sample = Only("""{"prompt": "", "completion": "cd"}""");
        Assert.That(sample.Targets, Is.EqualTo(new[] { 'd', End, -1 }));
    }

    [Test]
    public void Build_Messages_AsksForWhatTheAssistantSays()
    {
        TrainingSample sample = Only(
            """{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}, """ +
            """{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]}""");
        int[] expected =
        [
            Start, .. "user\nHi".Select(c => (int)c), End, '\n', Start, .. "assistant\nYo".Select(c => (int)c), End, '\n',
            Start, .. "user\n?".Select(c => (int)c), End, '\n', Start, .. "assistant\n!".Select(c => (int)c), End, '\n',
        ];
        Assert.That(sample.Ids, Is.EqualTo(expected));
        Assert.That(sample.Targets.Where(t => t >= 0), Is.EqualTo(new[] { 'Y', 'o', End, '!', End }));
        int y = Array.IndexOf(expected, 'Y');
        Assert.That(sample.Targets[y - 1], Is.EqualTo((int)'Y'), "the token before predicts it");
        Assert.That(sample.Targets[y + 2], Is.EqualTo(-1));
    }

    [Test]
    public void Build_Tokens_AreTakenAsTheyAre()
    {
        TrainingExample example = TrainingExample.FromTokens([5, 6, 7, 299], [true, true, false, true]);
        TrainingSample sample = Build(TrainingDataset.FromExamples([example])).Samples.Single();
        Assert.That(sample.Targets, Is.EqualTo(new[] { 6, -1, 299, -1 }));
    }

    [Test]
    public void Build_UnusableSamples_AreCountedByKind()
    {
        BuiltSamples built = Build(Lines(
            """{"text": ""}""", """{"text": "good"}""", """{"text": "far too long for it"}""", string.Empty,
            """{"prompt": "question", "completion": ""}""", """{"prompt": "", "completion": ""}""", """{"text": "12345678"}"""),
            tokensMax: 9);
        Assert.That((built.Samples.Count, built.SkippedEmpty, built.SkippedTooLong, built.SkippedWithoutTarget),
            Is.EqualTo((2, 2, 1, 1)));
        Assert.That(built.Skipped, Is.EqualTo(4));
    }

    [TestCase("""{"text": ""}""", "fewer than two")]
    [TestCase("""{"text": "far too long for it"}""", "20 tokens")]
    [TestCase("""{"prompt": "q", "completion": ""}""", "fewer than two")]
    [TestCase("""{"prompt": "qu", "completion": ""}""", "no token to learn")]
    public void Build_RefusingBadSamples_NamesTheLine(string line, string fault)
    {
        InvalidFileException error = Assert.Throws<InvalidFileException>(() =>
            Build(Lines("""{"text": "ok"}""", line), 9, refuse: true))!;
        Assert.That(error.Field, Is.EqualTo("line 2"));
        Assert.That(error.Fault, Does.Contain(fault));
    }

    [TestCase("""{"text": 3}""", "text")]
    [TestCase("""{"prompt": "x"}""", "completion")]
    [TestCase("""{"completion": "x"}""", "prompt")]
    [TestCase("""{"prompt": "x", "completion": null}""", "completion")]
    [TestCase("""{}""", "messages")]
    [TestCase("""["text"]""", "object")]
    [TestCase("""{"text": "a" """, "JSON")]
    [TestCase("""{"messages": []}""", "at least one")]
    [TestCase("""{"messages": "hi"}""", "array")]
    [TestCase("""{"messages": [{"role": "user"}]}""", "messages[0]")]
    [TestCase("""{"messages": [{"role": "user", "content": "x"}, {"role": 1, "content": "x"}]}""", "messages[1].role")]
    [TestCase("""{"messages": [{"role": "", "content": "x"}]}""", "line 3")]
    public void Build_BrokenLine_IsNamedWithItsFault(string line, string word)
    {
        TrainingDataset dataset = Lines("""{"text": "ok"}""", string.Empty, line);
        InvalidFileException error = Assert.Throws<InvalidFileException>(() => Build(dataset))!;
        Assert.That(error.File, Does.EndWith(".jsonl"));
        Assert.That(error.Field, Does.StartWith("line 3"));
        Assert.That(error.Message, Does.Contain(word));
    }

    [Test]
    public void Build_NothingLeft_IsRejectedWithCounts()
    {
        RequestRejectedException error = Assert.Throws<RequestRejectedException>(
            () => Build(Lines("""{"text": ""}""", """{"text": "far too long for it"}"""), 9))!;
        Assert.That(error.Message, Does.Contain("1 empty").And.Contain("1 longer than 9").And.Contain("0 without"));
        Assert.Throws<RequestRejectedException>(() => Build(Lines()));
        Assert.Throws<RequestRejectedException>(() => Build(TrainingDataset.FromExamples([])));
    }

    [TestCase(-1)]
    [TestCase(300)]
    public void Build_TokenOutsideTheVocabulary_NamesTheExample(int token)
    {
        TrainingDataset dataset = TrainingDataset.FromExamples(
            [TrainingExample.FromTokens([1, 2], [true, true]), TrainingExample.FromTokens([1, token], [true, true])]);
        InvalidFileException error = Assert.Throws<InvalidFileException>(() => Build(dataset))!;
        Assert.That(error.Field, Is.EqualTo("example 2"));
        Assert.That(error.Fault, Does.Contain($"{token}"));
    }

    [Test]
    public void Build_WithoutTokenizerOrTemplate_SaysWhatIsMissing()
    {
        var none = new SampleBuilder(_model.Config, null, null, 100, refuseBad: false);
        Assert.That(() => none.Build(Lines("""{"text": "x"}"""), default),
            Throws.TypeOf<RequestRejectedException>().With.Message.Contains("tokenizer"));
        var noTemplate = new SampleBuilder(_model.Config, _tokenizer, null, 100, refuseBad: false);
        TrainingDataset chat = TrainingDataset.FromExamples([TrainingExample.FromMessages([new ChatMessage("user", "x")])]);
        Assert.That(() => noTemplate.Build(chat, default),
            Throws.TypeOf<RequestRejectedException>().With.Message.Contains("template"));
    }

    [Test]
    public void FromExamples_Null_Throws()
    {
        Assert.Throws<ArgumentNullException>(() => TrainingExample.FromText(null!));
        Assert.Throws<ArgumentNullException>(() => TrainingExample.FromCompletion("x", null!));
        Assert.Throws<ArgumentNullException>(() => TrainingExample.FromMessages(null!));
        Assert.Throws<ArgumentOutOfRangeException>(() => TrainingExample.FromTokens([1, 2], [true]));
        Assert.Throws<InvalidFileException>(() => JsonlDataset.Open(_model["none.jsonl"]));
    }

    private TrainingSample Only(string line) => Build(Lines(line)).Samples.Single();

    private BuiltSamples Build(TrainingDataset dataset, int tokensMax = 100, bool refuse = false) =>
        new SampleBuilder(_model.Config, _tokenizer, ChatTemplate.ChatMl, tokensMax, refuse)
            .Build(dataset, CancellationToken.None);

    private JsonlDataset Lines(params string[] lines)
    {
        string path = _model[$"{_files++}.jsonl"];
        File.WriteAllLines(path, lines);
        return JsonlDataset.Open(path);
    }
}
