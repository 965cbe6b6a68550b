using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>Sizes of a view of up to four dimensions, and how far apart its elements are; those of the last one are neighbours.</summary>
internal readonly record struct ViewShape(long First, long Second, long Third, long Fourth, long Stride1, long Stride2, long Stride3)
{
    /// <summary>[rows, columns] without gaps.</summary>
    public static ViewShape Matrix(long rows, long columns) => new(rows, columns, 0, 0, columns, 1, 1);

    /// <summary>[first, second, third].</summary>
    public static ViewShape Cube(long first, long second, long third, long stride1, long stride2) =>
        new(first, second, third, 0, stride1, stride2, 1);

    public Tensor Of(Tensor memory, long offset) => this switch
    {
        { Third: 0 } => memory.as_strided([First, Second], [Stride1, Stride2], offset),
        { Fourth: 0 } => memory.as_strided([First, Second, Third], [Stride1, Stride2, Stride3], offset),
        _ => memory.as_strided([First, Second, Third, Fourth], [Stride1, Stride2, Stride3, 1], offset),
    };
}

/// <summary>
/// Views of one tensor's memory. Making one costs as much as a small operation, and the layers of a step, and the steps after it, ask for
/// the same ones. They are kept in two generations: when the younger is full, the older goes. So a view lives for as many new ones as a
/// generation holds at least, which is many more than an operation asks for.
/// </summary>
internal sealed class KeptViews : IDisposable
{
    /// <summary>The slots of a layer in two or three shapes each.</summary>
    public const int GenerationSize = 64;

    private Dictionary<(long Offset, ViewShape Shape), Tensor> _younger = [];
    private Dictionary<(long Offset, ViewShape Shape), Tensor> _older = [];

    /// <summary>A view that stays this object's: not to be disposed, and not to be held beyond the operation.</summary>
    public Tensor Of(Tensor memory, long offset, in ViewShape shape)
    {
        if (_younger.TryGetValue((offset, shape), out Tensor? view))
        {
            return view;
        }

        view = _older.Remove((offset, shape), out Tensor? known) ? known : shape.Of(memory, offset).DetachFromDisposeScope();
        if (_younger.Count == GenerationSize)
        {
            Dispose(_older);
            (_younger, _older) = (_older, _younger);
        }

        _younger.Add((offset, shape), view);
        return view;
    }

    public void Dispose()
    {
        Dispose(_younger);
        Dispose(_older);
    }

    private static void Dispose(Dictionary<(long Offset, ViewShape Shape), Tensor> views)
    {
        foreach (Tensor view in views.Values)
        {
            view.Dispose();
        }

        views.Clear();
    }
}
