using FlexLLM.Adapters;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Adapters;

[TestFixture]
internal sealed class LoraConfigTests
{
    private static readonly ModelConfig Model = TinyModel.ConfigOf(ModelArchitecture.Llama);

    private static IEnumerable<TestCaseData> Refused()
    {
        yield return new TestCaseData(new LoraConfig { TargetModules = [] }, "TargetModules");
        yield return new TestCaseData(new LoraConfig { TargetModules = ["wq"] }, "wq");
        yield return new TestCaseData(new LoraConfig { TargetModules = ["lm_head"] }, "lm_head");
        yield return new TestCaseData(new LoraConfig { TargetModules = ["q_proj", "q_proj"] }, "twice");
        yield return new TestCaseData(new LoraConfig { Rank = 0 }, "Rank");
        yield return new TestCaseData(new LoraConfig { Rank = 25, TargetModules = ["v_proj"] }, "1 to 24");
        yield return new TestCaseData(new LoraConfig { Alpha = 0 }, "Alpha");
        yield return new TestCaseData(new LoraConfig { Alpha = float.NaN }, "Alpha");
    }

    [TestCaseSource(nameof(Refused))]
    public void Validate_DoesNotFit_SaysWhy(LoraConfig config, string word) =>
        Assert.That(() => PeftAdapter.Validate(config, Model),
            Throws.TypeOf<RequestRejectedException>().With.Message.Contains(word));

    [Test]
    public void Scale_Plain_DividesByRank()
    {
        Assert.That(new LoraConfig { Rank = 4, Alpha = 6 }.Scale, Is.EqualTo(1.5f));
        Assert.That(new LoraConfig { Rank = 4, Alpha = 6, UseRsLora = true }.Scale, Is.EqualTo(3f));
    }
}
