using FlexLLM.Execution;
using FlexLLM.Primitives;
using NUnit.Framework;

namespace FlexLLM.Tests.Execution;

[TestFixture]
internal sealed class SamplerTests
{
    private static readonly float[] Logits = [1f, 3f, -2f, 3f, 0.5f];

    [Test]
    public void Sample_Greedy_TakesLowestIndexAmongEqualMaxima() => Assert.That(One(Logits, new()).TokenId, Is.EqualTo(1));

    [Test]
    public void Sample_GreedySignedZeros_AreEqual() => Assert.That(One([-1f, -0f, 0f], new()).TokenId, Is.EqualTo(1));

    [TestCase(0.9f)]
    [TestCase(0f)]
    public void Sample_NaNLogit_IsAFault(float temperature)
    {
        SampledToken token = One([1f, float.NaN, 2f], new() { Temperature = temperature, LogProbs = 2 });

        Assert.That(token.Fault, Is.EqualTo(SamplingFault.NotFinite));
        Assert.That(token.TokenId, Is.EqualTo(-1));
    }

    [Test]
    public void Sample_InfiniteLogit_IsAFault()
    {
        Assert.That(One([1f, float.PositiveInfinity], new()).Fault, Is.EqualTo(SamplingFault.NotFinite));
        SamplingParameters bias = new() { LogitBias = [new(1, float.NegativeInfinity)] };
        Assert.That(One([1f, float.PositiveInfinity], bias).Fault, Is.EqualTo(SamplingFault.NotFinite));
    }

    [Test]
    public void Sample_EverythingForbidden_IsAFault()
    {
        SamplingParameters all = new() { LogitBias = [new(0, float.NegativeInfinity), new(1, float.NegativeInfinity)] };

        Assert.That(One([1f, 2f], all).Fault, Is.EqualTo(SamplingFault.AllForbidden));
    }

    [Test]
    public void Sample_AllButOneForbidden_TakesIt([Range(0, 9)] int generated)
    {
        float[] logits = new float[50];
        Array.Fill(logits, float.NegativeInfinity);
        logits[37] = -4f;
        SamplingParameters parameters = new() { Temperature = 2f, TopK = 5, TopP = 0.99f, MinP = 0.01f };

        Assert.That(One(logits, parameters, generated).TokenId, Is.EqualTo(37));
    }

    [Test]
    public void Sample_LogitBias_IsAddedAndIdsBeyondTheRowIgnored()
    {
        SamplingParameters parameters = new() { LogitBias = [new(2, 5.5f), new(77, 100f)] };

        Assert.That(One(Logits, parameters).TokenId, Is.EqualTo(2));
    }

    [Test]
    public void Sample_RepetitionPenalty_DividesPositiveAndMultipliesNegative()
    {
        SamplingParameters parameters = new() { RepetitionPenalty = 2f };

        Assert.That(One([3f, 2f], parameters, prompt: [0]).TokenId, Is.EqualTo(1), "3 / 2 < 2");
        Assert.That(One([3f, 1.4f], parameters, prompt: [0, 0, 0]).TokenId, Is.Zero, "once, however often it was seen");
        Assert.That(One([-1f, -1.5f], parameters, prompt: [0]).TokenId, Is.EqualTo(1), "-1 * 2 < -1.5");
    }

    [Test]
    public void Sample_PresencePenalty_CountsGeneratedTokensOnlyAndOnce()
    {
        SamplingParameters parameters = new() { PresencePenalty = 1f };

        Assert.That(One([2f, 1.5f], parameters, prompt: [0]).TokenId, Is.Zero);
        Assert.That(One([2f, 1.5f], parameters, answer: [0]).TokenId, Is.EqualTo(1));
        Assert.That(One([2f, 0.5f], parameters, answer: [0, 0, 0]).TokenId, Is.Zero);
    }

    [Test]
    public void Sample_FrequencyPenalty_GrowsWithEachOccurrence()
    {
        SamplingParameters parameters = new() { FrequencyPenalty = 0.4f };

        Assert.That(One([2f, 1.5f], parameters, answer: [0]).TokenId, Is.Zero);
        Assert.That(One([2f, 1.5f], parameters, answer: [0, 0]).TokenId, Is.EqualTo(1));
    }

    [Test]
    public void Sample_BiasComesBeforeRepetitionPenalty()
    {
        SamplingParameters parameters = new() { RepetitionPenalty = 2f, LogitBias = [new(0, 4f)] };

        Assert.That(One([-1f, 1.4f], parameters, prompt: [0]).TokenId, Is.Zero, "(-1 + 4) / 2 > 1.4");
    }

    [Test]
    public void Sample_Logits_AreLeftAsTheyAre()
    {
        float[] logits = [.. Logits];
        One(logits, new() { Temperature = 0.7f, TopP = 0.9f, RepetitionPenalty = 1.5f, LogitBias = [new(0, 1f)] }, prompt: [1]);

        Assert.That(logits, Is.EqualTo(Logits));
    }

    [Test]
    public void Sample_Temperature_FollowsSoftmax([Values(0.5f, 1f, 3f)] float temperature)
    {
        int[] counts = Count(Logits, new() { Temperature = temperature }, 20_000);

        Assert.That(ChiSquare(counts, Softmax(Logits, temperature)), Is.LessThan(ChiSquare999[4]));
    }

    [Test]
    public void Sample_WrongTemperature_IsDetectedByChiSquare()
    {
        int[] counts = Count(Logits, new() { Temperature = 1.1f }, 20_000);

        Assert.That(ChiSquare(counts, Softmax(Logits, 1f)), Is.GreaterThan(ChiSquare999[4]));
    }

    [Test]
    public void Sample_TopK_KeepsTheMostProbableLowestIdFirst()
    {
        Assert.That(Support(Logits, new() { Temperature = 1f, TopK = 1 }), Is.EqualTo(new[] { 1 }));
        Assert.That(Support(Logits, new() { Temperature = 1f, TopK = 2 }), Is.EqualTo(new[] { 1, 3 }));
        Assert.That(Support(Logits, new() { Temperature = 1f, TopK = 3 }), Is.EqualTo(new[] { 0, 1, 3 }));
        Assert.That(Support(Logits, new() { Temperature = 9f, TopK = 99 }), Has.Length.EqualTo(5), "more than the vocabulary");
    }

    [Test]
    public void Sample_TopP_KeepsTheFewestThatReachTheMass()
    {
        float[] logits = [MathF.Log(0.5f), MathF.Log(0.3f), MathF.Log(0.15f), MathF.Log(0.05f)];

        Assert.That(Support(logits, new() { Temperature = 1f, TopP = 0f }), Is.EqualTo(new[] { 0 }));
        Assert.That(Support(logits, new() { Temperature = 1f, TopP = 0.45f }), Is.EqualTo(new[] { 0 }));
        Assert.That(Support(logits, new() { Temperature = 1f, TopP = 0.55f }), Is.EqualTo(new[] { 0, 1 }));
        Assert.That(Support(logits, new() { Temperature = 1f, TopP = 0.9f }), Is.EqualTo(new[] { 0, 1, 2 }));
        Assert.That(Support(logits, new() { Temperature = 1f, TopP = 1f }), Is.EqualTo(new[] { 0, 1, 2, 3 }));
    }

    [Test]
    public void Sample_TopP_SeesWhatTopKLeft()
    {
        float[] logits = [MathF.Log(0.4f), MathF.Log(0.3f), MathF.Log(0.3f)];

        // Of the two that top-k keeps, the first has 4/7 > 0.55 of the mass.
        Assert.That(Support(logits, new() { Temperature = 1f, TopK = 2, TopP = 0.55f }), Is.EqualTo(new[] { 0 }));
    }

    [Test]
    public void Sample_MinP_DropsBelowAShareOfTheBest()
    {
        float[] logits = [MathF.Log(0.5f), MathF.Log(0.3f), MathF.Log(0.15f), MathF.Log(0.05f)];

        Assert.That(Support(logits, new() { Temperature = 1f, MinP = 0.25f }), Is.EqualTo(new[] { 0, 1, 2 }));
        Assert.That(Support(logits, new() { Temperature = 1f, MinP = 1f }), Is.EqualTo(new[] { 0 }));
    }

    [Test]
    public void Sample_SameSeedAndPosition_SameToken()
    {
        SamplingParameters parameters = new() { Temperature = 1f, Seed = 5 };
        int[] first = Draws(parameters);

        Assert.That(Draws(parameters), Is.EqualTo(first));
        Assert.That(Draws(parameters with { Seed = 6 }), Is.Not.EqualTo(first));
        Assert.That(first.Distinct().Count(), Is.GreaterThan(2), "positions differ");

        static int[] Draws(SamplingParameters p) => [.. Enumerable.Range(0, 40).Select(i => One(Logits, p, i).TokenId)];
    }

    [Test]
    public void Sample_LogProbs_AreOfTheRawDistribution()
    {
        SamplingParameters parameters = new() { LogitBias = [new(2, 50f)], LogProbs = 3, Temperature = 0.1f };
        SampledToken token = One(Logits, parameters);
        double[] p = Softmax(Logits, 1f);

        Assert.That(token.TokenId, Is.EqualTo(2));
        Assert.That(token.LogProb, Is.EqualTo(Math.Log(p[2])).Within(1e-5));
        Assert.That(token.Alternatives!.Select(a => a.TokenId), Is.EqualTo(new[] { 1, 3, 0 }));
        double[] expected = [Math.Log(p[1]), Math.Log(p[3]), Math.Log(p[0])];
        Assert.That(token.Alternatives!.Select(a => (double)a.LogProb), Is.EqualTo(expected).Within(1e-5));
    }

    [Test]
    public void Sample_LogProbsZero_ReportsTheChosenOnly()
    {
        SampledToken token = One([0f, 0f], new() { LogProbs = 0 });

        Assert.That(token.LogProb, Is.EqualTo(-MathF.Log(2f)).Within(1e-6));
        Assert.That(token.Alternatives, Is.Empty);
        Assert.That(One([0f, 0f], new()).LogProb, Is.Null);
    }

    [Test]
    public void Sample_LogProbsMoreThanVocabulary_ReportsAll() =>
        Assert.That(One([0f, 1f], new() { LogProbs = 20 }).Alternatives, Has.Length.EqualTo(2));

    [Test]
    public void Sample_RandomParameters_AgreesWithFullSort([Range(1, 30)] int seed)
    {
        var random = new SeededRandom((ulong)seed);
        int disagreements = 0;
        for (int i = 0; i < 60; i++)
        {
            float[] logits = RandomLogits(ref random);
            SamplingParameters parameters = RandomParameters(ref random, logits.Length);
            int generated = random.Next(1_000);
            int expected = FullSort(logits, parameters, generated, p => p);
            disagreements += One(logits, parameters, generated).TokenId == expected ? 0 : 1;
        }

        Assert.That(disagreements, Is.Zero);
    }

    [Test]
    public void Sample_RandomParameters_FullSortWithAnotherTopP_IsDetected()
    {
        var random = new SeededRandom(1);
        int disagreements = 0;
        for (int i = 0; i < 200; i++)
        {
            float[] logits = RandomLogits(ref random);
            SamplingParameters parameters = RandomParameters(ref random, logits.Length);
            disagreements += One(logits, parameters, i).TokenId == FullSort(logits, parameters, i, p => p * 0.9f) ? 0 : 1;
        }

        Assert.That(disagreements, Is.GreaterThan(5));
    }

    /// <summary>What a device tells of a row, instead of the row; any order of equals.</summary>
    [Test]
    public void SampleLargest_RandomParameters_IsTheTokenOfTheWholeRow([Range(1, 20)] int seed)
    {
        var random = new SeededRandom((ulong)seed);
        (int told, int silent) = (0, 0);
        for (int i = 0; i < 200; i++)
        {
            float[] logits = RandomLogits(ref random);
            SamplingParameters parameters = RandomParameters(ref random, logits.Length) with { TopK = random.Next(1, 60) };
            int[] order = [.. Enumerable.Range(0, logits.Length)];
            random.Shuffle<int>(order);
            int count = Math.Min(logits.Length, parameters.TopK + random.Next(1, 9));
            int[] columns = [.. order.OrderByDescending(token => logits[token]).Take(count)];
            var history = new TokenHistory(countsTokens: false);

            SampledToken? token = new Sampler(logits.Length).SampleLargest(
                [.. columns.Select(c => logits[c])], columns, parameters, history);

            bool isTie = parameters.TopK < logits.Length && logits.Order().Reverse().ElementAt(parameters.TopK - 1) is float last &&
                (last - logits.Max()) / parameters.Temperature ==
                (logits.Order().Reverse().ElementAt(parameters.TopK) - logits.Max()) / parameters.Temperature;
            Assert.That(token is null, Is.EqualTo(isTie));
            (told, silent) = token is null ? (told, silent + 1) : (told + 1, silent);
            Assert.That(token ?? One(logits, parameters), Is.EqualTo(One(logits, parameters)), $"row {i}");
        }

        Assert.That(told > 20 && silent > 5, Is.True, $"{told} and {silent}");
    }

    [Test]
    public void SampleLargest_NoFiniteLogit_DoesNotTell([Values(float.NaN, float.PositiveInfinity, float.NegativeInfinity)] float largest)
    {
        SamplingParameters parameters = new() { Temperature = 1f, TopK = 1 };
        SampledToken? token = new Sampler(3).SampleLargest([largest, 0f], [2, 1], parameters, new TokenHistory(countsTokens: false));
        Assert.That(token, Is.Null);
    }

    [Test]
    public void Candidates_WhatNeedsTheWholeRow_HasNone()
    {
        SamplingParameters small = new() { Temperature = 1f, TopK = 50, TopP = 0.9f, MinP = 0.1f };

        Assert.That(small.Candidates, Is.EqualTo(50));
        SamplingParameters[] others =
        [
            small with { TopK = 0 }, small with { TopK = 128 }, small with { Temperature = 0f }, small with { RepetitionPenalty = 1.1f },
            small with { LogProbs = 0 }, small with { LogitBias = [new(1, 2f)] }, small with { PresencePenalty = 0.1f },
        ];
        Assert.That(others.Select(o => o.Candidates), Is.All.Null);
    }

    [Test]
    public void Sample_SteadyState_AllocatesNothing()
    {
        const int Vocabulary = 5_000;
        var random = new SeededRandom(3);
        float[] logits = [.. Enumerable.Range(0, Vocabulary).Select(_ => (float)random.NextGaussian() * 3f)];
        var sampler = new Sampler(Vocabulary);
        SamplingParameters greedy = new() { RepetitionPenalty = 1.1f, LogitBias = [new(1, 2f)] };
        SamplingParameters nucleus = new() { Temperature = 0.8f, TopK = 100, TopP = 0.95f, MinP = 0.01f };
        var history = new TokenHistory(countsTokens: true);
        history.AddPrompt([1, 2, 3]);
        sampler.Sample(logits, greedy, history);
        sampler.Sample(logits, nucleus, history);

        long before = GC.GetAllocatedBytesForCurrentThread();
        for (int i = 0; i < 20; i++)
        {
            sampler.Sample(logits, greedy, history);
            sampler.Sample(logits, nucleus, history);
        }

        Assert.That(GC.GetAllocatedBytesForCurrentThread() - before, Is.Zero);
    }

    private static SampledToken One(
        float[] logits, SamplingParameters parameters, int generated = 0, int[]? prompt = null, int[]? answer = null)
    {
        var history = new TokenHistory(parameters.CountsTokens);
        history.AddPrompt(prompt ?? []);
        for (int i = 0; i < generated; i++)
        {
            history.AddGenerated(0);
        }

        foreach (int token in answer ?? [])
        {
            history.AddGenerated(token);
        }

        return new Sampler(logits.Length).Sample(logits, parameters, history);
    }

    private static int[] Count(float[] logits, SamplingParameters parameters, int draws)
    {
        var sampler = new Sampler(logits.Length);
        var history = new TokenHistory(countsTokens: false);
        int[] counts = new int[logits.Length];
        for (int i = 0; i < draws; i++)
        {
            int token = sampler.Sample(logits, parameters, history).TokenId;
            counts[token]++;
            history.AddGenerated(token);
        }

        return counts;
    }

    private static int[] Support(float[] logits, SamplingParameters parameters)
    {
        int[] counts = Count(logits, parameters, 1_000);
        return [.. Enumerable.Range(0, logits.Length).Where(i => counts[i] > 0)];
    }

    private static double[] Softmax(float[] logits, float temperature)
    {
        double[] weights = [.. logits.Select(l => Math.Exp(l / (double)temperature))];
        return [.. weights.Select(w => w / weights.Sum())];
    }

    // 99.9 % quantiles of the chi-square distribution, by degrees of freedom.
    private static readonly double[] ChiSquare999 = [0.0, 10.83, 13.82, 16.27, 18.47];

    private static double ChiSquare(int[] counts, double[] probabilities)
    {
        double draws = counts.Sum();
        return counts.Zip(probabilities, (c, p) => (c - (draws * p)) * (c - (draws * p)) / (draws * p)).Sum();
    }

    private static float[] RandomLogits(ref SeededRandom random)
    {
        float[] logits = new float[random.Next(1, 400)];
        float scale = random.Next(3) switch { 0 => 0.01f, 1 => 3f, _ => 60f };
        bool coarse = random.Next(2) == 0; // Many ties.
        for (int i = 0; i < logits.Length; i++)
        {
            float logit = (float)random.NextGaussian() * scale;
            logits[i] = random.Next(20) == 0 && i > 0 ? float.NegativeInfinity : coarse ? MathF.Round(logit) : logit;
        }

        return logits;
    }

    private static SamplingParameters RandomParameters(ref SeededRandom random, int vocabulary) => new()
    {
        Temperature = 0.05f + (2f * random.NextSingle()),
        TopK = random.Next(2) == 0 ? 0 : random.Next(2 * vocabulary),
        TopP = random.Next(2) == 0 ? 1f : random.NextSingle(),
        MinP = random.Next(2) == 0 ? 0f : random.NextSingle() * 0.5f,
        Seed = random.NextUInt64(),
    };

    // The definition, without any shortcut: sort everything, cut, walk.
    private static int FullSort(float[] logits, SamplingParameters parameters, int generated, Func<float, float> topP)
    {
        float best = logits.Max();
        float[] relative = [.. logits.Select(l => (l - best) / parameters.Temperature)];
        IEnumerable<int> sorted = Enumerable.Range(0, logits.Length).OrderByDescending(i => relative[i]);
        int[] ranked = [.. parameters.TopK > 0 ? sorted.Take(parameters.TopK) : sorted];
        double[] weights = [.. relative.Select(r => (double)MathF.Exp(r))];
        double wanted = ranked.Sum(i => weights[i]) * topP(parameters.TopP);
        double above = 0.0;
        var kept = new List<int>();
        foreach (int i in ranked)
        {
            if (kept.Count > 0 && above >= wanted && parameters.TopP < 1f)
            {
                break;
            }

            above += weights[i];
            kept.Add(i);
        }

        kept.RemoveAll(i => weights[i] < parameters.MinP || weights[i] == 0.0);
        kept.Sort();
        double uniform = Sampler.UniformAt(parameters.Seed, generated) * kept.Sum(i => weights[i]);
        double sum = 0.0;
        return kept.Find(i => (sum += weights[i]) > uniform);
    }
}
