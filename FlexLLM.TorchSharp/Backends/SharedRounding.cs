using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// The BF16 copy of the rows that were multiplied last. q, k and v are products of the same rows, and so are gate and up: the first of
/// them makes the copy, the others find it. It is dropped as soon as anybody reaches for these rows other than as the input of a product,
/// to write them or not, so nobody has to say when they change. Rows that are BF16 already need none.
/// </summary>
internal sealed class SharedRounding : IDisposable
{
    private TorchTensor? _owner;
    private long _first;
    private long _count;
    private Tensor? _copy;

    /// <summary>Copies that were made.</summary>
    public long Count { get; private set; }

    /// <summary>
    /// Elements [first, first + count) of a tensor that owns memory, which <paramref name="values"/> are, rounded to nearest even. It
    /// stays this object's, until the next call or until the elements are touched.
    /// </summary>
    public Tensor Of(TorchTensor owner, long first, long count, Tensor values)
    {
        if (_copy is not null && owner == _owner && first == _first && count == _count)
        {
            return _copy;
        }

        Dispose();
        _copy = values.to_type(torch.ScalarType.BFloat16).DetachFromDisposeScope();
        (_owner, _first, _count) = (owner, first, count);
        Count++;
        return _copy;
    }

    /// <summary>These elements may change.</summary>
    public void Touch(TorchTensor owner, long first, long count)
    {
        if (_copy is not null && owner == _owner && first < _first + _count && _first < first + count)
        {
            Dispose();
        }
    }

    /// <summary>Drops the copy.</summary>
    public void Dispose()
    {
        _copy?.Dispose();
        (_copy, _owner) = (null, null);
    }
}
