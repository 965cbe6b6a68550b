using System.Numerics.Tensors;
using FlexLLM.Backends;
using FlexLLM.Primitives;

namespace FlexLLM.Execution;

/// <summary>Why no token could be chosen.</summary>
internal enum SamplingFault
{
    None,

    /// <summary>A logit is NaN or positive infinity: the model's arithmetic broke down.</summary>
    NotFinite,

    /// <summary>Every logit is negative infinity: the bias forbids the whole vocabulary.</summary>
    AllForbidden,
}

/// <summary>
/// The chosen token, or why there is none (TokenId -1). LogProb and Alternatives (most probable first) only where the
/// request asked for them.
/// </summary>
internal readonly record struct SampledToken(
    int TokenId, SamplingFault Fault, float? LogProb = null, TokenLogProb[]? Alternatives = null)
{
    public static SampledToken Failed(SamplingFault fault) => new(-1, fault);
}

/// <summary>
/// Chooses tokens from logits. The choice depends on the logits, the parameters and the history alone, so neither the
/// rest of the batch nor a preemption changes it. Owns scratch rows of one vocabulary; one thread at a time.
/// </summary>
internal sealed class Sampler(int vocabularySize)
{
    private const int BucketCount = 1024;

    // Scores further below the best than this share the last bucket: together they weigh next to nothing.
    private const float SpreadMax = 64f;

    private readonly float[] _scores = new float[vocabularySize];

    // Candidates in ascending token order: id, score relative to the best (0 or less), exp(score).
    private readonly int[] _ids = new int[vocabularySize];
    private readonly float[] _relative = new float[vocabularySize];
    private readonly float[] _weights = new float[vocabularySize];

    private readonly double[] _bucketMass = new double[BucketCount];
    private readonly int[] _bucketTokens = new int[BucketCount];
    private ulong[] _ranks = new ulong[64];

    /// <summary>Chooses the next token. Logits: one row of the vocabulary, left as they are.</summary>
    public SampledToken Sample(ReadOnlySpan<float> logits, SamplingParameters parameters, TokenHistory history)
    {
        Check.That(logits.Length == vocabularySize);
        Check.That(history.CountsTokens || !parameters.CountsTokens);
        ReadOnlySpan<float> scores = logits;
        float best = TensorPrimitives.Max(logits); // NaN where any logit is.
        if (!float.IsNaN(best) && (parameters.LogitBias.Length > 0 || parameters.CountsTokens))
        {
            logits.CopyTo(_scores);
            AddBias(_scores, parameters);
            Penalise(_scores, parameters, history);
            scores = _scores;
            best = TensorPrimitives.Max(scores);
        }

        if (!float.IsFinite(best))
        {
            return SampledToken.Failed(best == float.NegativeInfinity ? SamplingFault.AllForbidden : SamplingFault.NotFinite);
        }

        int token = parameters.IsGreedy ? scores.IndexOf(best) : Draw(scores, best, parameters, history.GeneratedCount);
        if (parameters.LogProbs is not int alternatives)
        {
            return new SampledToken(token, SamplingFault.None);
        }

        float logSumExp = LogSumExp(logits);
        TokenLogProb[] top = MostProbable(logits, Math.Min(alternatives, logits.Length), logSumExp);
        return new SampledToken(token, SamplingFault.None, logits[token] - logSumExp, top);
    }

    /// <summary>
    /// The same choice among the largest logits alone, for parameters that have <see cref="SamplingParameters.Candidates"/>: bit by bit
    /// what the whole row gives.
    /// </summary>
    /// <param name="values">
    /// The largest logits, the largest first: the candidates and one more, or the whole row where it is shorter.
    /// </param>
    /// <param name="columns">Their tokens.</param>
    /// <param name="parameters">How to choose.</param>
    /// <param name="history">What the answer has so far.</param>
    /// <returns>
    /// Null where they do not tell: the last of the candidates has an equal that may be the lower token, or there is no choice at all.
    /// </returns>
    public SampledToken? SampleLargest(
        ReadOnlySpan<float> values, ReadOnlySpan<int> columns, SamplingParameters parameters, TokenHistory history)
    {
        Check.That(parameters.Candidates is not null);
        int count = Math.Min(parameters.TopK, vocabularySize);
        Check.That(values.Length >= Math.Min(count + 1, vocabularySize) && columns.Length == values.Length);
        float best = values[0];
        bool mayTie = count < vocabularySize;
        if (!float.IsFinite(best) ||
            (mayTie && (values[count] - best) / parameters.Temperature == (values[count - 1] - best) / parameters.Temperature))
        {
            return null;
        }

        columns[..count].CopyTo(_ids);
        values[..count].CopyTo(_relative);
        _ids.AsSpan(0, count).Sort(_relative.AsSpan(0, count));

        // Never fewer than a vector has, so that the exponential is computed as for the whole row; what is behind them is not read.
        Spread(_relative.AsSpan(0, Math.Min(ScratchLimits.LargestMax, vocabularySize)), best, parameters.Temperature);
        return new SampledToken(Draw(count, parameters, history.GeneratedCount), SamplingFault.None);
    }

    private static void AddBias(Span<float> scores, SamplingParameters parameters)
    {
        foreach ((int token, float bias) in parameters.LogitBias)
        {
            if (token < scores.Length) // Ids beyond the vocabulary bias nothing.
            {
                scores[token] += bias;
            }
        }
    }

    private static void Penalise(Span<float> scores, SamplingParameters parameters, TokenHistory history)
    {
        if (!parameters.CountsTokens)
        {
            return;
        }

        foreach ((int token, int generated) in history.GeneratedByToken)
        {
            ref float score = ref scores[token];
            score = score > 0f ? score / parameters.RepetitionPenalty : score * parameters.RepetitionPenalty;
            if (generated > 0)
            {
                score -= parameters.PresencePenalty + (generated * parameters.FrequencyPenalty);
            }
        }
    }

    private int Draw(ReadOnlySpan<float> scores, float best, SamplingParameters parameters, int generatedCount)
    {
        int count = scores.Length;
        scores.CopyTo(_relative);
        Spread(_relative, best, parameters.Temperature);
        for (int i = 0; i < count; i++)
        {
            _ids[i] = i;
        }

        if (parameters.TopK > 0 && parameters.TopK < count)
        {
            count = KeepTopK(count, parameters.TopK);
        }

        return Draw(count, parameters, generatedCount);
    }

    // Of the first so many candidates.
    private int Draw(int count, SamplingParameters parameters, int generatedCount)
    {
        if (parameters.TopP < 1f)
        {
            count = KeepTopP(count, parameters.TopP);
        }

        return Invert(count, parameters.MinP, UniformAt(parameters.Seed, generatedCount));
    }

    // Scores relative to the best, and their exponentials.
    private void Spread(Span<float> scores, float best, float temperature)
    {
        TensorPrimitives.Subtract(scores, best, scores);
        TensorPrimitives.Divide(scores, temperature, scores);
        TensorPrimitives.Exp<float>(scores, _weights);
    }

    /// <summary>The random number of one position of one request: a function, so that no state is lost or repeated.</summary>
    internal static double UniformAt(ulong seed, int generatedCount)
    {
        ulong key = new SeededRandom(seed).NextUInt64(); // Hashed first: neighbouring seeds share nothing.
        return new SeededRandom(key ^ (ulong)generatedCount).NextDouble();
    }

    private int KeepTopK(int count, int k)
    {
        Span<int> tokens = _bucketTokens;
        tokens.Clear();
        float bucketsPerUnit = BucketsPerUnit(count);
        for (int i = 0; i < count; i++)
        {
            tokens[BucketOf(_relative[i], bucketsPerUnit)]++;
        }

        int bucket = 0;
        int above = 0;
        while (above + tokens[bucket] < k)
        {
            above += tokens[bucket++];
        }

        ReadOnlySpan<ulong> ranks = Rank(count, bucket, tokens[bucket], bucketsPerUnit);
        return KeepDownTo(count, ranks[k - above - 1]);
    }

    /// <summary>
    /// Keeps a token while the tokens ranked above it have less than the wanted mass; the first is always kept.
    /// </summary>
    private int KeepTopP(int count, float p)
    {
        Span<double> masses = _bucketMass;
        Span<int> tokens = _bucketTokens;
        masses.Clear();
        tokens.Clear();
        float bucketsPerUnit = BucketsPerUnit(count);
        double total = 0.0;
        for (int i = 0; i < count; i++)
        {
            int b = BucketOf(_relative[i], bucketsPerUnit);
            masses[b] += _weights[i];
            tokens[b]++;
            total += _weights[i];
        }

        double wanted = total * p;
        int bucket = 0;
        double above = 0.0;
        int last = BucketCount - 1;
        while (bucket < last && (tokens[bucket] == 0 || above + masses[bucket] < wanted))
        {
            above += masses[bucket++];
        }

        while (tokens[bucket] == 0) // Rounding ran past the end: keep everything.
        {
            bucket--;
        }

        ReadOnlySpan<ulong> ranks = Rank(count, bucket, tokens[bucket], bucketsPerUnit);
        int kept = 0;
        do
        {
            above += _weights[(int)(uint)ranks[kept++]];
        }
        while (kept < ranks.Length && above < wanted);

        return KeepDownTo(count, ranks[kept - 1]);
    }

    /// <summary>Buckets divide the scores evenly, best first: few tokens fall into one, however flat the distribution.</summary>
    private float BucketsPerUnit(int count)
    {
        float spread = Math.Min(-TensorPrimitives.Min<float>(_relative.AsSpan(0, count)), SpreadMax);
        return spread > 0f ? (BucketCount - 1) / spread : 0f;
    }

    private static int BucketOf(float relative, float bucketsPerUnit) =>
        (int)Math.Min(-relative * bucketsPerUnit, BucketCount - 1);

    /// <summary>The candidates of one bucket, most probable first, the lower token first among equals.</summary>
    private ReadOnlySpan<ulong> Rank(int count, int bucket, int tokens, float bucketsPerUnit)
    {
        if (_ranks.Length < tokens)
        {
            _ranks = new ulong[Math.Min(vocabularySize, 2 * tokens)];
        }

        int found = 0;
        for (int i = 0; i < count; i++)
        {
            if (BucketOf(_relative[i], bucketsPerUnit) == bucket)
            {
                _ranks[found++] = RankOf(i);
            }
        }

        Check.That(found == tokens);
        Span<ulong> ranks = _ranks.AsSpan(0, found);
        ranks.Sort();
        return ranks;
    }

    // Bits of a non-negative float order as the float does; the candidate, in token order, breaks ties.
    private ulong RankOf(int candidate) =>
        ((ulong)BitConverter.SingleToUInt32Bits(MathF.Abs(_relative[candidate])) << 32) | (uint)candidate;

    private int KeepDownTo(int count, ulong lastRank)
    {
        int kept = 0;
        for (int i = 0; i < count; i++)
        {
            if (RankOf(i) <= lastRank)
            {
                (_ids[kept], _relative[kept], _weights[kept]) = (_ids[i], _relative[i], _weights[i]);
                kept++;
            }
        }

        return kept;
    }

    /// <summary>Inverse of the cumulative distribution, summed in ascending token order.</summary>
    private int Invert(int count, float minP, double uniform)
    {
        double total = 0.0;
        for (int i = 0; i < count; i++)
        {
            total += _weights[i] >= minP ? _weights[i] : 0.0;
        }

        double wanted = uniform * total;
        double sum = 0.0;
        int drawn = -1;
        for (int i = 0; i < count && sum <= wanted; i++)
        {
            if (_weights[i] > 0f && _weights[i] >= minP)
            {
                sum += _weights[i];
                drawn = _ids[i];
            }
        }

        Check.That(drawn >= 0); // The best token weighs 1 and is never dropped.
        return drawn;
    }

    private float LogSumExp(ReadOnlySpan<float> logits)
    {
        float best = TensorPrimitives.Max(logits);
        TensorPrimitives.Subtract(logits, best, _relative);
        TensorPrimitives.Exp<float>(_relative, _weights);
        double sum = 0.0;
        foreach (float weight in _weights)
        {
            sum += weight;
        }

        return (float)(best + Math.Log(sum));
    }

    private static TokenLogProb[] MostProbable(ReadOnlySpan<float> logits, int count, float logSumExp)
    {
        float[] values = new float[count];
        int[] tokens = new int[count];
        LargestValues.Find(logits, values, tokens);
        return [.. tokens.Select((token, i) => new TokenLogProb(token, values[i] - logSumExp))];
    }
}
