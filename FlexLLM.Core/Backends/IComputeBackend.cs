using FlexLLM.Primitives;

namespace FlexLLM.Backends;

/// <summary>
/// The narrow waist: everything that the engine asks of a device, forward and backward side by side, on row-major F32
/// batches; activations may be narrower (<see cref="TensorUse"/>), and what is written there is rounded. The caller owns every
/// tensor, also the destinations. One thread calls at a time. Shapes are the caller's promise: a wrong one is a broken
/// invariant (<see cref="System.Diagnostics.UnreachableException"/>), never a silent result.
/// Unless an operation says otherwise, a destination must not overlap a source, and an empty slice (0 rows) is legal and does
/// nothing.
/// </summary>
/// <remarks>
/// A backend that promises bitwise determinism (the CPU backend does) computes each output element by one fixed sequence of
/// floating-point operations, which depends neither on the other rows of the call, nor on how a sequence was cut into calls,
/// nor on the number of threads. Sums over tokens (gradients of bypass weights, keys and values) take rows in descending order
/// and continue from the value already in the accumulator, so that backward windows taken from the end of a sequence give the
/// bits of one call over all of it.
/// </remarks>
internal interface IComputeBackend : IDisposable
{
    /// <summary>What the user reads in logs and reports, for example "cpu (2 threads)".</summary>
    string Name { get; }

    /// <summary>Device bytes now held by tensors, weights, caches and scratch memory of this backend.</summary>
    long AllocatedBytes { get; }

    /// <summary>
    /// Bytes of the device's own memory that were free before this backend took any; null where tensors live in the memory of the
    /// process, of which the engine knows as much.
    /// </summary>
    /// <exception cref="FlexLlmException">The device does not tell; the message says what to set instead.</exception>
    long? MemoryBytes => null;

    /// <summary>
    /// Waits until all that was asked for is done. A device may return from calls before; only those that give the host something to
    /// read wait by themselves. Whoever reads a clock after a call calls this first, and whoever changes a block table that a call was
    /// given.
    /// </summary>
    void Synchronize();

    /// <summary>
    /// Whether an operation threw this because memory for its temporaries ran out: its results are then undefined, all else is as it
    /// was, and a smaller call may go well.
    /// </summary>
    bool IsOutOfMemory(Exception fault) => fault is OutOfMemoryException;

    /// <summary>
    /// Backends of one kind read each other's tensors where they lie (<see cref="ReadPeer"/>); null where values of another backend come
    /// through the host alone.
    /// </summary>
    string? PeerKind => null;

    /// <summary>What a tensor of that shape holds, in bytes. Like all told sizes it is exact and allocates nothing.</summary>
    long TensorBytes(int rows, int columns, TensorUse use = TensorUse.Exact);

    /// <summary>What a weight of that shape and stored type holds, in bytes.</summary>
    long WeightBytes(int outFeatures, int inFeatures, DType type);

    /// <summary>
    /// What one matrix [inner, wide] of a bypass holds, derived copies included; a LoRA pair is FactorBytes(rank, in) +
    /// FactorBytes(rank, out).
    /// </summary>
    long FactorBytes(int inner, int wide);

    /// <summary>What a KV cache of that shape holds, in bytes: blocks times a constant.</summary>
    long KvCacheBytes(int layers, int blocks, int kvHeads, int headDim);

    /// <summary>Scratch memory that <see cref="ReserveScratch"/> holds for these limits, in bytes.</summary>
    long ScratchBytes(in ScratchLimits limits);

    /// <summary>
    /// Sizes scratch memory for calls within these limits, growing or shrinking it to exactly <see cref="ScratchBytes"/>. From
    /// then on it stays so: a call beyond the limits is a broken invariant. A backend without a reservation grows on demand. Asked for
    /// after what lives longer than a call: a device may leave the room to whoever allocates next. Asked for again, for the same limits,
    /// after more of that, it takes the room anew where there is any, and fails of nothing.
    /// </summary>
    void ReserveScratch(in ScratchLimits limits);

    /// <summary>A tensor of zeros, of the type that the backend has for this use.</summary>
    DeviceTensor Allocate(int rows, int columns, TensorUse use = TensorUse.Exact);

    /// <summary>
    /// A matrix inside the memory of a tensor, of its type: element (0, 0) is element <paramref name="offset"/> (a multiple of 16) of
    /// the owner, counted row by row. It holds no memory of its own, and is invalid once its owner is freed.
    /// </summary>
    DeviceTensor View(DeviceTensor owner, long offset, int rows, int columns);

    /// <summary>
    /// Copies W [out, in] to the device. <paramref name="type"/> is F32 or BF16; narrowing rounds to nearest even.
    /// </summary>
    DeviceWeight CreateWeight(in HostMatrix source, DType type);

    /// <summary>A KV cache; contents are undefined until appended.</summary>
    DeviceKvCache CreateKvCache(int layers, int blocks, int kvHeads, int headDim);

    /// <summary>
    /// Takes the blocks behind the given number away, or adds such; the others keep their contents. A cache shrinks to a
    /// multiple of <see cref="DeviceKvCache.BlocksPerExtent"/> and grows from one. Where memory runs out, it has the blocks it had.
    /// </summary>
    void ResizeKvCache(DeviceKvCache cache, int blocks);

    /// <summary>A bypass matrix of zeros.</summary>
    DeviceFactor CreateFactor(int inner, int wide);

    /// <summary>Brings derived copies up to date after the values were written (upload, optimizer step).</summary>
    void RefreshFactor(DeviceFactor factor);

    /// <summary>Copies host floats, row-major, into all of <paramref name="destination"/>, rounded to its type.</summary>
    void Upload(ReadOnlySpan<float> source, TensorSlice destination);

    /// <summary>Copies all of <paramref name="source"/> to the host, waiting for it.</summary>
    void Download(TensorSlice source, Span<float> destination);

    /// <summary>
    /// destination = source (equal shapes), between tensors of one type bit by bit: <see cref="Pack"/> makes patterns that look like NaN.
    /// </summary>
    void Copy(TensorSlice source, TensorSlice destination);

    /// <summary>
    /// destination (+)= source, element by element: a rectangle of this backend's tensor and one of the same shape in a tensor of another
    /// backend of this <see cref="PeerKind"/>, or of this one. Sums are F32 (each is rounded to the destination's type), copies between
    /// tensors of one type keep all bits; the rectangles must not overlap.
    /// </summary>
    /// <remarks>
    /// The two backends have a thread each, and the threads meet before the call and after it. What the source's backend was called for
    /// before they met is read, however late its device computes it; what it is called for after they met again comes after the reading.
    /// In between the other thread may not write there, but may read and may call its backend for anything else.
    /// </remarks>
    void ReadPeer(TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate) =>
        throw new NotSupportedException($"Values of other backends come to {Name} through the host.");

    /// <summary>destination = 0.</summary>
    void Zero(TensorSlice destination);

    /// <summary>y[i] = table row ids[i], widened to F32. table: [vocab, cols]; y: [ids.Length, cols].</summary>
    void Gather(DeviceWeight table, ReadOnlySpan<int> ids, TensorSlice y);

    /// <summary>
    /// y = x / rms(x) * gain, rms(x) = sqrt(mean(x^2) + epsilon), over each group of gain.Columns columns: gain [1, n], x and
    /// y [rows, g * n]. g = 1 is the ordinary norm, g = heads is Qwen3's q/k norm. y may be x.
    /// </summary>
    void RmsNorm(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y);

    /// <summary>
    /// Gradient of <see cref="RmsNorm"/> for a frozen gain, with r = 1/rms(x) of the group:
    /// dx (+)= r * (dy*gain) - x * r^3 / n * sum(dy*gain*x). x is the forward input. Adds to dx when
    /// <paramref name="accumulate"/>. dx may be dy when not accumulating.
    /// </summary>
    void RmsNormBackward(TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate);

    /// <summary>y (+)= x W^T + bias. x [rows, in], W [out, in], bias [1, out] or null, y [rows, out].</summary>
    void Linear(TensorSlice x, DeviceWeight weight, DeviceTensor? bias, TensorSlice y, bool accumulate);

    /// <summary>dx (+)= dy W: the input gradient of <see cref="Linear"/>. dy [rows, out], dx [rows, in].</summary>
    void LinearBackwardInput(TensorSlice dy, DeviceWeight weight, TensorSlice dx, bool accumulate);

    /// <summary>
    /// For each segment's rows: y += scale * (x A^T) B^T. x [rows, in], y [rows, out]. Segments ascend and do not overlap; rows
    /// outside every segment keep their y.
    /// </summary>
    void LoraBypass(TensorSlice x, ReadOnlySpan<LoraSegment> segments, TensorSlice y);

    /// <summary>
    /// Gradients of <see cref="LoraBypass"/> for rows of one adapter, with u = x A^T and du = scale * dy B:
    /// gradA += du^T x, gradBTransposed += (scale * u)^T dy, both over rows in descending order, continuing from the stored
    /// accumulator; and dx += du A unless dx is null. gradA [rank, in], gradBTransposed [rank, out], dy [rows, out].
    /// </summary>
    void LoraBypassBackward(
        TensorSlice x, TensorSlice dy, DeviceFactor a, DeviceFactor bTransposed, float scale, DeviceTensor gradA,
        DeviceTensor gradBTransposed, TensorSlice? dx);

    /// <summary>
    /// u (+)= scale * (x M^T), from the many columns of the model to the few inside a bypass. x [rows, Wide], u [rows, Inner].
    /// The product is summed by itself, then scaled, then added where <paramref name="accumulate"/>.
    /// </summary>
    void Narrow(TensorSlice x, DeviceFactor m, float scale, TensorSlice u, bool accumulate);

    /// <summary>
    /// y (+)= scale * (u M), back to the columns of the model; with the gradient of u as u, the gradient of x of
    /// <see cref="Narrow"/>. u [rows, Inner], y [rows, Wide]. u is scaled first; the sum continues from y where
    /// <paramref name="accumulate"/>.
    /// </summary>
    void Widen(TensorSlice u, DeviceFactor m, float scale, TensorSlice y, bool accumulate);

    /// <summary>
    /// gradient += (scale * u)^T x, over rows in descending order, continuing from the stored accumulator: the gradient of M of
    /// <see cref="Narrow"/> (u is then the gradient of its result) and of <see cref="Widen"/> (x is). u [rows, Inner],
    /// x [rows, Wide], gradient [Inner, Wide].
    /// </summary>
    void AddOuter(TensorSlice u, TensorSlice x, float scale, DeviceTensor gradient);

    /// <summary>y += bias in every row. y [rows, n], bias [1, n].</summary>
    void AddBias(TensorSlice y, DeviceTensor bias);

    /// <summary>
    /// gradient += sum of the rows of dy, in descending order, continuing from the stored accumulator: the gradient of a bias.
    /// dy [rows, n], gradient [1, n].
    /// </summary>
    void AddColumnSums(TensorSlice dy, DeviceTensor gradient);

    /// <summary>
    /// y (+)= x * (gain - 1): what (IA)^3 adds to x. x, y [rows, n], gain [1, n]. y may be x: an accumulating call then makes it
    /// x * gain up to rounding.
    /// </summary>
    void ScaleColumns(TensorSlice x, DeviceTensor gain, TensorSlice y, bool accumulate);

    /// <summary>
    /// Gradients of <see cref="ScaleColumns"/>: gradGain += sum over rows of x * dy, in descending order, continuing from the
    /// stored accumulator; and dx (+)= dy * (gain - 1) unless dx is null. x, dy, dx [rows, n], gain, gradGain [1, n]. dx may be
    /// dy: an accumulating call then makes it dy * gain up to rounding. It must not be x.
    /// </summary>
    void ScaleColumnsBackward(
        TensorSlice x, TensorSlice dy, DeviceTensor gain, DeviceTensor gradGain, TensorSlice? dx, bool accumulate);

    /// <summary>
    /// destination[i, destinationColumn + j] = source[i, sourceColumn + j] for j in [0, columns), as <see cref="Copy"/>. Rows are equal,
    /// columns need not be. Both may be the same rows of a tensor where the columns do not overlap.
    /// </summary>
    void CopyColumns(TensorSlice source, int sourceColumn, TensorSlice destination, int destinationColumn, int columns);

    /// <summary>y = max(x, 0), element by element; equal shapes. NaN stays NaN. y may be x.</summary>
    void Relu(TensorSlice x, TensorSlice y);

    /// <summary>
    /// dx = y &gt; 0 ? dy : 0, element by element; equal shapes. y is the result of <see cref="Relu"/> or anything positive at
    /// the same places: its argument, or its unpacked <see cref="PackedFormat.SignBits"/>. dx may be dy or y.
    /// </summary>
    void ReluBackward(TensorSlice y, TensorSlice dy, TensorSlice dx);

    /// <summary>y = x * sigmoid(x), element by element; equal shapes. y may be x.</summary>
    void Silu(TensorSlice x, TensorSlice y);

    /// <summary>
    /// dx = dy * s * (1 + x * (1 - s)), s = sigmoid(x), element by element; equal shapes. x is the argument of
    /// <see cref="Silu"/>. dx may be dy or x.
    /// </summary>
    void SiluBackward(TensorSlice x, TensorSlice dy, TensorSlice dx);

    /// <summary>
    /// Makes rows small. source [rows, n], packed [rows, <see cref="PackedFormats.PackedColumns"/>], allocated for this format
    /// (<see cref="TensorUse.PackedBF16"/>), holds bit patterns instead of numbers: copy its rows to others of the format, hand them to
    /// <see cref="Unpack"/>, and read them as nothing else. Which bit lies where is the backend's business, but a packed row depends on its
    /// source row alone.
    /// </summary>
    void Pack(TensorSlice source, PackedFormat format, TensorSlice packed);

    /// <summary>The rows that <see cref="Pack"/> made small, as far as the format kept them. destination [rows, n].</summary>
    void Unpack(TensorSlice packed, PackedFormat format, TensorSlice destination);

    /// <summary>
    /// Rotates each head of x in place by its row's position: with h = headDim/2, (x[i], x[i+h]) becomes (x[i] cos - x[i+h] sin,
    /// x[i+h] cos + x[i] sin). table [positions, headDim] holds cos in columns [0, h) and sin in [h, headDim). x [rows, heads *
    /// headDim], one position per row. The inverse (sin negated) is also the gradient.
    /// </summary>
    void Rope(TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse);

    /// <summary>
    /// Stores key and value rows of each segment at its positions, rounded to <see cref="DeviceKvCache.Type"/>: attention and its
    /// gradient are those of what is stored. k, v [rows, kvHeads * headDim].
    /// </summary>
    void AppendKv(TensorSlice k, TensorSlice v, int layer, ReadOnlySpan<AttentionSegment> segments);

    /// <summary>
    /// Causal attention: the row at position t attends positions 0..t of its sequence, all appended before. q, o [rows,
    /// queryHeads * headDim]; query head i reads KV head i / (queryHeads / kvHeads). Scores are scaled by 1/sqrt(headDim).
    /// Rows of q outside every segment are not touched in o.
    /// </summary>
    void Attention(TensorSlice q, TensorSlice o, int layer, ReadOnlySpan<AttentionSegment> segments);

    /// <summary>
    /// Gradient of <see cref="Attention"/> for one window (a segment with LogSumExp filled by the forward call): with P =
    /// exp(S - lse), dV[j] += P^T dO, dP = dO V^T, dS = P * (dP - rowsum(P * dP)), dQ = dS K / sqrt(headDim), dK[j] +=
    /// dS^T Q / sqrt(headDim), summed over the query heads of a group. q, dO, dQ [window rows, queryHeads * headDim]: the
    /// segment's RowStart is ignored, row i is position PositionStart + i. dQ is overwritten; dK, dV [positions, kvHeads *
    /// headDim] are accumulators at absolute positions: rows [0, end of window) receive their share, in descending row order.
    /// </summary>
    void AttentionBackward(
        TensorSlice q, TensorSlice dO, int layer, in AttentionSegment window, TensorSlice dQ, DeviceTensor dK, DeviceTensor dV);

    /// <summary>y = silu(gate) * up, element by element; equal shapes. y may be gate or up.</summary>
    void SiluGate(TensorSlice gate, TensorSlice up, TensorSlice y);

    /// <summary>
    /// dGate = dy * up * s * (1 + gate * (1 - s)), dUp = dy * gate * s, s = sigmoid(gate). Destinations may be dy or the sources.
    /// </summary>
    void SiluGateBackward(TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp);

    /// <summary>y = a + b. y may be a or b.</summary>
    void Add(TensorSlice a, TensorSlice b, TensorSlice y);

    /// <summary>
    /// logits row i = x row rows[i] times head^T. x [*, hidden], head [vocab, hidden], logits [rows.Length, vocab].
    /// </summary>
    void Logits(TensorSlice x, ReadOnlySpan<int> rows, DeviceWeight head, TensorSlice logits);

    /// <summary>
    /// The column of each row's largest value, the lowest where several are; -1 where a value is NaN or the largest is infinite. Waits for
    /// the device. x [columns.Length, n].
    /// </summary>
    void ArgMax(TensorSlice x, Span<int> columns);

    /// <summary>
    /// The largest values of each row and their columns, the largest first; which of equal ones, and in which order, is the device's
    /// business. A row with a NaN has one as its first value, and the rest of it says nothing. Waits for the device.
    /// x [rows, n]; values and columns [rows, count], row by row; count is 1 to n and at most <see cref="ScratchLimits.LargestMax"/>.
    /// </summary>
    void Largest(TensorSlice x, int count, Span<float> values, Span<int> columns);

    /// <summary>
    /// Cross-entropy of softmax(x head^T) against targets, forward and backward at once, in chunks of rows, so that rows x vocab
    /// logits never exist. targets[i] &lt; 0 means no target: the row is not multiplied with the head, its loss is 0 and its dx
    /// is 0. losses[i] = -log softmax(logits_i)[targets[i]] (not scaled); dx_i = gradientScale * (softmax(logits_i) - onehot)
    /// head. x, dx [rows, hidden]; losses [rows, 1], F32.
    /// </summary>
    void FusedLinearCrossEntropy(
        TensorSlice x, ReadOnlySpan<int> targets, DeviceWeight head, float gradientScale, TensorSlice dx, TensorSlice losses);

    /// <summary>
    /// PyTorch's SGD: g = gradient + weightDecay * p; with momentum: v = momentum * v + g (on the first step v = g, which zeros in v
    /// give) and g = nesterov ? g + momentum * v : v; p -= learningRate * g. velocity is null without momentum.
    /// </summary>
    void SgdStep(DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options);

    /// <summary>
    /// PyTorch's AdamW: p *= 1 - lr * weightDecay; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
    /// p -= lr / (1 - b1^step) * m / (sqrt(v) / sqrt(1 - b2^step) + epsilon).
    /// </summary>
    void AdamWStep(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2, in AdamWStepOptions options);
}
