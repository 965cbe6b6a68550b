using FlexLLM.Execution;
using NUnit.Framework;

namespace FlexLLM.Tests.Execution;

[TestFixture]
internal sealed class SamplingOptionsTests
{
    [Test]
    public void Validate_ValueOutOfRange_NamesTheProperty()
    {
        (SamplingOptions Options, string Property)[] cases =
        [
            (new() { Temperature = -0.1f }, "Temperature"),
            (new() { Temperature = float.NaN }, "Temperature"),
            (new() { Temperature = float.PositiveInfinity }, "Temperature"),
            (new() { TopK = -1 }, "TopK"),
            (new() { TopP = 1.1f }, "TopP"),
            (new() { TopP = float.NaN }, "TopP"),
            (new() { MinP = -0.1f }, "MinP"),
            (new() { RepetitionPenalty = 0f }, "RepetitionPenalty"),
            (new() { PresencePenalty = 2.1f }, "PresencePenalty"),
            (new() { FrequencyPenalty = float.NaN }, "FrequencyPenalty"),
            (new() { LogitBias = new Dictionary<int, float> { [-1] = 0f } }, "LogitBias"),
            (new() { LogitBias = new Dictionary<int, float> { [1] = float.NaN } }, "LogitBias"),
            (new() { LogitBias = new Dictionary<int, float> { [1] = float.PositiveInfinity } }, "LogitBias"),
            (new() { LogProbs = 21 }, "LogProbs"),
            (new() { LogProbs = -1 }, "LogProbs"),
        ];
        foreach ((SamplingOptions options, string property) in cases)
        {
            Assert.That(
                options.Validate,
                Throws.ArgumentException.With.Property("ParamName").EqualTo(property).And.Message.StartsWith(property));
        }
    }

    [Test]
    public void Validate_EdgesOfTheRanges_AreAccepted()
    {
        SamplingOptions options = new()
        {
            Temperature = 0f,
            TopK = 0,
            TopP = 0f,
            MinP = 1f,
            RepetitionPenalty = 0.01f,
            PresencePenalty = -2f,
            FrequencyPenalty = 2f,
            LogitBias = new Dictionary<int, float> { [0] = float.NegativeInfinity },
            LogProbs = 20,
        };

        Assert.That(options.Validate, Throws.Nothing);
    }

    [Test]
    public void Resolve_Null_TakesTheCheckpointsDefault()
    {
        SamplingDefaults defaults = new() { Temperature = 0.7f, TopK = 20, TopP = 0.8f, RepetitionPenalty = 1.05f };

        SamplingParameters parameters = new SamplingOptions { TopK = 5 }.Resolve(defaults, engineSeed: 9);

        Assert.That((parameters.Temperature, parameters.TopK, parameters.TopP), Is.EqualTo((0.7f, 5, 0.8f)));
        Assert.That((parameters.MinP, parameters.RepetitionPenalty, parameters.Seed), Is.EqualTo((0f, 1.05f, 9ul)));
    }

    [Test]
    public void Resolve_OwnSeed_WinsOverTheEngines() =>
        Assert.That(new SamplingOptions { Seed = 3 }.Resolve(new SamplingDefaults(), 9).Seed, Is.EqualTo(3ul));
}
