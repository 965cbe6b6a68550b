namespace FlexLLM.Finetuning;

/// <summary>Samples of a dataset, and how many were left out.</summary>
internal sealed record BuiltSamples(IReadOnlyList<TrainingSample> Samples, int SkippedEmpty, int SkippedTooLong, int SkippedWithoutTarget)
{
    public int Skipped => SkippedEmpty + SkippedTooLong + SkippedWithoutTarget;
}

/// <summary>Turns examples into token ids and targets, once, before a job starts.</summary>
internal sealed class SampleBuilder(ModelConfig config, Tokenizer? tokenizer, ChatTemplate? template, int tokensMax, bool refuseBad)
{
    /// <summary>Most samples of one dataset.</summary>
    public const int SamplesMax = 10_000_000;

    /// <summary>Tokenises a dataset.</summary>
    /// <exception cref="InvalidFileException">A malformed line, or a bad sample when those are refused.</exception>
    /// <exception cref="RequestRejectedException">
    /// Nothing is left to train on, or the checkpoint lacks what the examples need.
    /// </exception>
    public BuiltSamples Build(TrainingDataset dataset, CancellationToken cancellationToken)
    {
        var samples = new List<TrainingSample>();
        int empty = 0;
        int tooLong = 0;
        int withoutTarget = 0;
        foreach ((string file, string place, TrainingExample example) in dataset.Read())
        {
            cancellationToken.ThrowIfCancellationRequested();
            (int[] ids, bool[] carriesLoss) = Encode(example, file, place);
            string? fault = null;
            if (ids.Length < 2)
            {
                fault = "has fewer than two tokens";
                empty++;
            }
            else if (ids.Length > tokensMax)
            {
                fault = $"has {ids.Length} tokens; the longest sample may have {tokensMax}";
                tooLong++;
            }
            else if (!carriesLoss.AsSpan(1).Contains(true))
            {
                fault = "has no token to learn";
                withoutTarget++;
            }

            if (fault is null)
            {
                samples.Add(TrainingSample.FromTokens(ids, carriesLoss));
            }
            else if (refuseBad)
            {
                throw new InvalidFileException(file, place, fault);
            }

            if (samples.Count > SamplesMax)
            {
                throw new RequestRejectedException($"The dataset has more than {SamplesMax} samples.");
            }
        }

        return samples.Count > 0
            ? new BuiltSamples(samples, empty, tooLong, withoutTarget)
            : throw new RequestRejectedException(
                $"The dataset has no sample to train on: {empty} empty, {tooLong} longer than {tokensMax} tokens, " +
                $"{withoutTarget} without a target.");
    }

    private (int[] Ids, bool[] CarriesLoss) Encode(TrainingExample example, string file, string place)
    {
        if (example.Tokens is not null)
        {
            int[] ids = [.. example.Tokens];
            int bad = Array.FindIndex(ids, id => (uint)id >= (uint)config.VocabularySize);
            return bad < 0
                ? (ids, [.. example.CarriesLoss!])
                : throw new InvalidFileException(file, place, $"token id {ids[bad]} is outside the vocabulary of {config.VocabularySize}");
        }

        if (tokenizer is null)
        {
            throw new RequestRejectedException("The checkpoint has no tokenizer.json: give the examples as token ids.");
        }

        if (example.Messages is not null)
        {
            ChatTemplate chat = template ??
                throw new RequestRejectedException(
                    "The checkpoint has no chat template that this library knows: give prompts and completions instead.");
            try
            {
                EncodedChat encoded = chat.Encode(tokenizer, example.Messages);
                return (encoded.Ids, encoded.AssistantMask);
            }
            catch (ArgumentException e)
            {
                throw new InvalidFileException(file, place, e.Message, e);
            }
        }

        if (example.Completion is not null)
        {
            int[] prompt = WithoutEnd(tokenizer.Encode(example.Prompt!, addSpecialTokens: true));
            int[] completion = WithEnd(tokenizer.EncodeContinuation(example.Completion));
            bool[] carriesLoss = new bool[prompt.Length + completion.Length];
            carriesLoss.AsSpan(prompt.Length).Fill(true);
            return ([.. prompt, .. completion], carriesLoss);
        }

        int[] text = example.Text!.Length == 0 ? [] : WithEnd(tokenizer.Encode(example.Text, addSpecialTokens: true));
        return (text, [.. Enumerable.Repeat(true, text.Length)]);
    }

    private int? End => tokenizer!.EosId ?? (config.EosTokenIds.Count > 0 ? config.EosTokenIds[0] : null);

    // Some tokenizers end every text; a prompt goes on.
    private int[] WithoutEnd(int[] ids) => ids.Length > 0 && ids[^1] == End ? ids[..^1] : ids;

    // Without an end token the model would learn answers that never stop.
    private int[] WithEnd(int[] ids) =>
        ids.Length > 0 && End is int id && id < config.VocabularySize && ids[^1] != id ? [.. ids, id] : ids;
}
