using FlexLLM.Primitives;

namespace FlexLLM.Backends;

/// <summary>What a tensor is for, and so of which type it is.</summary>
internal enum TensorUse
{
    /// <summary>F32 on every backend: parameters, gradients of them, moments, logits, log-sum-exp, sums over tokens.</summary>
    Exact,

    /// <summary>Rows of a model's values or of their gradients: F32, or the narrower type that a backend was opened with.</summary>
    Activation,

    /// <summary>Rows that <see cref="IComputeBackend.Pack"/> makes, of <see cref="PackedFormat.BF16"/>; columns are floats.</summary>
    PackedBF16,

    /// <summary>The same of <see cref="PackedFormat.SignBits"/>.</summary>
    PackedSignBits,
}

/// <summary>What other things are allocated as.</summary>
internal static class TensorUses
{
    public static TensorUse Of(PackedFormat format) => format == PackedFormat.BF16 ? TensorUse.PackedBF16 : TensorUse.PackedSignBits;
}

/// <summary>A row-major matrix [Rows, Columns] in device memory. Owned by whoever asked the backend for it.</summary>
internal abstract class DeviceTensor(int rows, int columns) : IDisposable
{
    public int Rows { get; } = rows;

    public int Columns { get; } = columns;

    /// <summary>What its elements are rounded to, to nearest even, when they are written.</summary>
    public virtual DType Type => DType.F32;

    /// <summary>Device bytes that this tensor holds.</summary>
    public abstract long Bytes { get; }

    /// <summary>Rows [start, start + count).</summary>
    public TensorSlice Slice(int start, int count) => new(this, start, count);

    public abstract void Dispose();

    public static implicit operator TensorSlice(DeviceTensor tensor) => new(tensor, 0, tensor.Rows);
}

/// <summary>Rows [Start, Start + Rows) of a tensor: what nearly every operation reads and writes.</summary>
internal readonly record struct TensorSlice
{
    public TensorSlice(DeviceTensor tensor, int start, int rows)
    {
        Check.That(start >= 0 && rows >= 0 && start + rows <= tensor.Rows);
        Tensor = tensor;
        Start = start;
        Rows = rows;
    }

    public DeviceTensor Tensor { get; }

    public int Start { get; }

    public int Rows { get; }

    public int Columns => Tensor.Columns;

    /// <summary>On a group of devices each rank has its share of the rows, at the beginning, and nothing of the others.</summary>
    public bool IsRowSplit { get; init; }

    /// <summary>Rows [start, start + count) of this slice.</summary>
    public TensorSlice Slice(int start, int count)
    {
        Check.That(start >= 0 && count >= 0 && start + count <= Rows && !IsRowSplit);
        return new TensorSlice(Tensor, Start + start, count);
    }
}

/// <summary>A frozen weight matrix W [OutFeatures, InFeatures] in whatever layout the backend multiplies best.</summary>
internal abstract class DeviceWeight(int outFeatures, int inFeatures, DType type) : IDisposable
{
    public int OutFeatures { get; } = outFeatures;

    public int InFeatures { get; } = inFeatures;

    /// <summary>Storage type: F32 or BF16.</summary>
    public DType Type { get; } = type;

    public abstract long Bytes { get; }

    public abstract void Dispose();
}

/// <summary>
/// One trainable matrix of a bypass, M [Inner, Wide], between the few columns inside the bypass and the many of the model:
/// LoRA's A [rank, in], or its B transposed, [rank, out]. A backend may keep derived copies: call
/// <see cref="IComputeBackend.RefreshFactor"/> after writing <see cref="Values"/>.
/// </summary>
internal abstract class DeviceFactor(int inner, int wide) : IDisposable
{
    public int Inner { get; } = inner;

    public int Wide { get; } = wide;

    /// <summary>[Inner, Wide].</summary>
    public abstract DeviceTensor Values { get; }

    /// <summary>Device bytes, derived copies included.</summary>
    public abstract long Bytes { get; }

    public abstract void Dispose();
}

/// <summary>
/// Paged storage of keys (after RoPE) and values for every layer: Blocks blocks of <see cref="TokensPerBlock"/> positions.
/// Which block holds which positions of which sequence is the caller's business (block tables).
/// </summary>
internal abstract class DeviceKvCache(int layers, int blocks, int kvHeads, int headDim) : IDisposable
{
    /// <summary>Positions per KV block, on every backend.</summary>
    public const int TokensPerBlock = 16;

    /// <summary>
    /// Blocks whose memory comes and goes together, on every backend; the last extent of a cache may have fewer.
    /// </summary>
    public const int BlocksPerExtent = 16;

    public int Layers { get; } = layers;

    /// <summary>Blocks now; <see cref="IComputeBackend.ResizeKvCache"/> changes it.</summary>
    public int Blocks { get; protected set; } = blocks;

    public int KvHeads { get; } = kvHeads;

    public int HeadDim { get; } = headDim;

    /// <summary>What keys and values are rounded to when they are appended, to nearest even; whoever reads them sees that.</summary>
    public virtual DType Type => DType.F32;

    public abstract long Bytes { get; }

    public abstract void Dispose();

    /// <summary>Whole extents come and go: see <see cref="IComputeBackend.ResizeKvCache"/>.</summary>
    protected void CheckResize(int blocks)
    {
        Check.That(blocks >= 0);
        Check.That((blocks < Blocks ? blocks : Blocks) % BlocksPerExtent == 0 || blocks == Blocks);
    }
}

/// <summary>
/// Rows [RowStart, RowStart + RowCount) of a batch go through one adapter's pair at one site: A [rank, in] as PEFT stores
/// lora_A, and lora_B transposed, [rank, out].
/// </summary>
internal readonly record struct LoraSegment(
    int RowStart, int RowCount, DeviceFactor A, DeviceFactor BTransposed, float Scale);

/// <summary>
/// Rows [RowStart, RowStart + RowCount) of a batch are the positions [PositionStart, PositionStart + RowCount) of one
/// sequence: a decode row, a prefill chunk or a finetuning window. Position p lives in block BlockTable[p / 16] at offset
/// p % 16. Where <see cref="LogSumExp"/> is given ([positions, query heads]), attention stores the natural-log sum of
/// exponentials of each row's scaled scores at the row's absolute position.
/// </summary>
internal readonly record struct AttentionSegment(
    int RowStart, int RowCount, int PositionStart, DeviceKvCache Cache, int[] BlockTable, DeviceTensor? LogSumExp = null);

/// <summary>Where AdamW stands: hyper-parameters and the 1-based number of this step.</summary>
internal readonly record struct AdamWStepOptions(
    float LearningRate, float Beta1, float Beta2, float Epsilon, float WeightDecay, int Step);

/// <summary>Hyper-parameters of one SGD step.</summary>
internal readonly record struct SgdStepOptions(float LearningRate, float Momentum, bool Nesterov, float WeightDecay);
