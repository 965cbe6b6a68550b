using FlexLLM.Backends;

namespace FlexLLM.Execution;

/// <summary>
/// Chooses the next tokens of a batch. Logits stay on the device where the largest of them are enough, which is so for greedy requests
/// and for those with a small top-k; else the row goes to the host. One thread at a time.
/// </summary>
/// <param name="backend">The device with the logits.</param>
/// <param name="vocabularySize">Columns of a row.</param>
/// <param name="rowsMax">Most rows of a batch.</param>
internal sealed class TokenChooser(IComputeBackend backend, int vocabularySize, int rowsMax)
{
    private readonly Sampler _sampler = new(vocabularySize);
    private readonly float[] _row = new float[vocabularySize];
    private readonly int[] _best = new int[rowsMax];
    private float[] _values = [];
    private int[] _columns = [];
    private TensorSlice _logits;
    private bool _wantsBest;
    private int _count;

    /// <summary>Forgets the batch before.</summary>
    public void Clear() => (_wantsBest, _count) = (false, 0);

    /// <summary>A row of the next batch is to be chosen from like that.</summary>
    public void Expect(SamplingParameters parameters)
    {
        _wantsBest |= parameters.IsArgMax;

        // One more, to see whether it equals the last.
        _count = parameters.Candidates is int candidates ? Math.Max(_count, Math.Min(candidates + 1, vocabularySize)) : _count;
    }

    /// <summary>Asks the device for what the expected rows need of their logits [rows, vocabulary].</summary>
    public void Read(TensorSlice logits)
    {
        _logits = logits;
        if (_wantsBest)
        {
            backend.ArgMax(logits, _best.AsSpan(0, logits.Rows));
        }

        if (_count > 0)
        {
            int length = logits.Rows * _count;
            if (_values.Length < length)
            {
                (_values, _columns) = (new float[rowsMax * _count], new int[rowsMax * _count]);
            }

            backend.Largest(logits, _count, _values.AsSpan(0, length), _columns.AsSpan(0, length));
        }
    }

    /// <summary>Chooses from a row of the logits that were read; its parameters were expected.</summary>
    public SampledToken Choose(int row, SamplingParameters parameters, TokenHistory history)
    {
        if (parameters.IsArgMax && _best[row] >= 0)
        {
            return new SampledToken(_best[row], SamplingFault.None);
        }

        if (parameters.Candidates is not null)
        {
            Range own = (row * _count)..((row + 1) * _count);
            if (_sampler.SampleLargest(_values.AsSpan(own), _columns.AsSpan(own), parameters, history) is SampledToken token)
            {
                return token;
            }
        }

        backend.Download(_logits.Slice(row, 1), _row);
        return _sampler.Sample(_row, parameters, history);
    }
}
