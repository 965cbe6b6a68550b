using System.Numerics.Tensors;
using System.Runtime.InteropServices;
using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.Primitives;

namespace FlexLLM.Models;

/// <summary>
/// A model on a device: its compiled graph and the weights that the graph's instructions name. On a group of devices the graph is that of
/// one rank, and each weight is divided among them.
/// </summary>
internal sealed class LoadedModel : IDisposable
{
    private readonly GraphCompiler _compiler;
    private readonly List<IDisposable> _owned = [];
    private readonly DeviceWeight?[] _matrices;
    private readonly DeviceTensor?[] _vectors;

    private LoadedModel(
        ModelConfig config, IComputeBackend backend, int positionsMax, ModelShard? shard = null, GraphCompiler? compiler = null)
    {
        Check.That(positionsMax > 0 && positionsMax <= config.MaxPositions);
        Whole = config;
        Shard = shard ?? ModelShard.Of(config, backend);
        Check.That(((backend as GroupBackend)?.Ranks ?? 1) == Ranks);
        Config = Shard?.Local ?? config;
        Backend = backend;
        PositionsMax = positionsMax;
        _compiler = compiler ?? Compile(config, Shard);
        _matrices = new DeviceWeight?[_compiler.WeightNames.Count];
        _vectors = new DeviceTensor?[_compiler.WeightNames.Count];
        RopeTable = Own(backend.Allocate(positionsMax, config.HeadDim));
    }

    /// <summary>Shape of what is on a device: the whole model, or a rank's share of its heads and of its MLP.</summary>
    public ModelConfig Config { get; }

    /// <summary>Shape of the whole model.</summary>
    public ModelConfig Whole { get; }

    /// <summary>How the model is divided among a group's ranks; null where one device holds the whole.</summary>
    public ModelShard? Shard { get; }

    /// <summary>Devices that the model is on.</summary>
    public int Ranks => Shard?.Ranks ?? 1;

    public IComputeBackend Backend { get; }

    /// <summary>Longest sequence that the rotary table covers, in tokens.</summary>
    public int PositionsMax { get; }

    public ForwardProgram Program => _compiler.Forward;

    /// <summary>[positions, headDim]: cosines, then sines.</summary>
    public DeviceTensor RopeTable { get; }

    /// <summary>Bytes of the backbone on the device.</summary>
    public long WeightBytes => _matrices.Sum(m => m?.Bytes ?? 0) + _vectors.Sum(v => v?.Bytes ?? 0) + RopeTable.Bytes;

    /// <summary>Compiles the model's graph with a bypass at every site, before there is a device.</summary>
    /// <param name="config">The whole model.</param>
    /// <param name="shard">How it will be divided; null for one device.</param>
    public static GraphCompiler Compile(ModelConfig config, ModelShard? shard = null)
    {
        ParallelGraph whole = DecoderBuilder.BuildServing(config);
        return new GraphCompiler(shard?.Parallelize(whole, networks: null) ?? whole, config.LayerCount);
    }

    /// <summary>Type that a matrix of a checkpoint is held in: the wanted one, else BF16 as it is and F32 for all others.</summary>
    public static DType HeldType(SafetensorsTensor tensor, DType? wanted) =>
        wanted ?? (tensor.AsMatrix().Type == DType.BF16 ? DType.BF16 : DType.F32);

    /// <summary>Reads the weights of a checkpoint onto a device.</summary>
    /// <param name="checkpoint">The open checkpoint.</param>
    /// <param name="config">Its config.</param>
    /// <param name="backend">The device; it stays the caller's.</param>
    /// <param name="weightType">F32 or BF16, or null: see <see cref="HeldType"/>.</param>
    /// <param name="positionsMax">Longest sequence to serve, at most the config's.</param>
    /// <param name="shard">How to divide it among the ranks of a group; null as <see cref="ModelShard.Of"/> says.</param>
    /// <param name="compiler">The model as <see cref="Compile"/> gave it; null compiles it here.</param>
    /// <param name="cancellationToken">Gives up between two tensors.</param>
    /// <exception cref="InvalidFileException">A tensor is missing, misshapen, or not finite.</exception>
    public static LoadedModel Load(
        SafetensorsCheckpoint checkpoint, ModelConfig config, IComputeBackend backend, DType? weightType, int positionsMax,
        ModelShard? shard = null, GraphCompiler? compiler = null, CancellationToken cancellationToken = default)
    {
        return Filled(
            new LoadedModel(config, backend, positionsMax, shard, compiler),
            shape => Checked(shape).ToFloats(),
            (model, shape) =>
            {
                SafetensorsTensor tensor = Checked(shape);
                return model.Place(shape, tensor.AsMatrix(), HeldType(tensor, weightType));
            },
            cancellationToken);

        SafetensorsTensor Checked(WeightShape shape)
        {
            SafetensorsTensor tensor = checkpoint.Get(shape.Name);
            CheckTensor(tensor, tensor.AsMatrix(), shape);
            return tensor;
        }
    }

    /// <summary>A model of random weights, without a checkpoint.</summary>
    /// <param name="weights">Its shape and weights; not used after the call.</param>
    /// <param name="backend">The device; it stays the caller's.</param>
    /// <param name="positionsMax">Longest sequence, at most the config's.</param>
    /// <param name="shard">How to divide it among the ranks of a group; null as <see cref="ModelShard.Of"/> says.</param>
    /// <param name="compiler">The model as <see cref="Compile"/> gave it; null compiles it here.</param>
    public static LoadedModel CreateRandom(
        RandomWeights weights, IComputeBackend backend, int positionsMax, ModelShard? shard = null,
        GraphCompiler? compiler = null) => Filled(
        new LoadedModel(weights.Config, backend, positionsMax, shard, compiler),
        weights.Vector,
        (model, shape) => model.Place(shape, weights.Matrix(shape), weights.Type));

    /// <summary>A model of that shape whose weights are all zero: for a backend that computes nothing.</summary>
    /// <param name="config">Its shape.</param>
    /// <param name="backend">The device; it stays the caller's.</param>
    /// <param name="weightType">F32 or BF16.</param>
    /// <param name="positionsMax">Longest sequence, at most the config's.</param>
    public static LoadedModel CreateEmpty(ModelConfig config, IComputeBackend backend, DType weightType, int positionsMax)
    {
        return Filled(new LoadedModel(config, backend, positionsMax), _ => null, Zeros);

        // Pages that nobody reads take no memory.
        unsafe DeviceWeight Zeros(LoadedModel model, WeightShape shape)
        {
            void* zeros = NativeMemory.AllocZeroed((nuint)shape.Count, (nuint)DTypes.BytesOf(weightType));
            try
            {
                return model.Place(shape, new HostMatrix((byte*)zeros, weightType, shape.Rows, shape.Columns), weightType);
            }
            finally
            {
                NativeMemory.Free(zeros);
            }
        }
    }

    public DeviceWeight Matrix(int weight)
    {
        Check.That(_matrices[weight] is not null);
        return _matrices[weight]!;
    }

    public DeviceTensor Vector(int weight)
    {
        Check.That(_vectors[weight] is not null);
        return _vectors[weight]!;
    }

    /// <summary>The backward program of a job that trains these networks.</summary>
    public TrainingProgram CompileTraining(IReadOnlyDictionary<int, BypassNetwork> bypasses, CompilerOptions? options = null) =>
        _compiler.CompileTraining(TrainingGraph(bypasses), options);

    /// <summary>The graph of a job before differentiation, as this device has it.</summary>
    public ParallelGraph TrainingGraph(IReadOnlyDictionary<int, BypassNetwork> bypasses)
    {
        ParallelGraph whole = DecoderBuilder.BuildTraining(Whole, bypasses);
        return Shard?.Parallelize(whole, bypasses) ?? whole;
    }

    public void Dispose()
    {
        foreach (IDisposable owned in _owned)
        {
            owned.Dispose();
        }
    }

    // Vectors as numbers, or null for zeros; matrices on the device. A model that cannot be filled is disposed.
    private static LoadedModel Filled(
        LoadedModel model, Func<WeightShape, float[]?> vectorOf, Func<LoadedModel, WeightShape, DeviceWeight> matrixOf,
        CancellationToken cancellationToken = default)
    {
        try
        {
            model.FillRopeTable();
            Dictionary<string, int> indices = model._compiler.WeightNames.Index().ToDictionary(w => w.Item, w => w.Index);
            foreach (WeightShape shape in DecoderWeights.Of(model.Whole))
            {
                cancellationToken.ThrowIfCancellationRequested();
                int weight = indices[shape.Name];
                if (!shape.IsVector)
                {
                    model._matrices[weight] = model.Own(matrixOf(model, shape));
                    continue;
                }

                int columns = model.Shard?.PartOf(shape, 0).Columns.Count ?? shape.Columns;
                DeviceTensor vector = model._vectors[weight] = model.Own(model.Backend.Allocate(1, columns));
                if (vectorOf(shape) is float[] values)
                {
                    model.Place(shape, values, vector);
                }
            }

            return model;
        }
        catch
        {
            model.Dispose();
            throw;
        }
    }

    private DeviceWeight Place(WeightShape shape, HostMatrix whole, DType type) => Backend is GroupBackend group
        ? group.CreateWeight(rank => CreatePart(rank.Device, whole, type, Shard!.PartOf(shape, rank.Index)))
        : Backend.CreateWeight(whole, type);

    private void Place(WeightShape shape, float[] whole, DeviceTensor vector)
    {
        if (Backend is not GroupBackend group)
        {
            Backend.Upload(whole, vector);
            return;
        }

        foreach (GroupRank rank in group.Settle())
        {
            (_, Shard columns, bool isZero) = Shard!.PartOf(shape, rank.Index);
            rank.Device.Upload(isZero ? new float[columns.Count] : whole.AsSpan(columns.Start, columns.Count), rank.Of(vector));
        }
    }

    // A slice of columns is copied together first; a slice of rows lies together in the file.
    private static unsafe DeviceWeight CreatePart(
        IComputeBackend backend, in HostMatrix whole, DType type, (Shard Rows, Shard Columns, bool IsZero) part)
    {
        (Shard rows, Shard columns, _) = part;
        int bytes = DTypes.BytesOf(whole.Type);
        long rowBytes = (long)whole.Columns * bytes;
        byte* first = whole.Data + (rows.Start * rowBytes) + ((long)columns.Start * bytes);
        if (columns.Count == whole.Columns)
        {
            return backend.CreateWeight(new HostMatrix(first, whole.Type, rows.Count, columns.Count), type);
        }

        long partBytes = (long)columns.Count * bytes;
        byte* copy = (byte*)NativeMemory.Alloc((nuint)(rows.Count * partBytes));
        try
        {
            for (int row = 0; row < rows.Count; row++)
            {
                Buffer.MemoryCopy(first + (row * rowBytes), copy + (row * partBytes), partBytes, partBytes);
            }

            return backend.CreateWeight(new HostMatrix(copy, whole.Type, rows.Count, columns.Count), type);
        }
        finally
        {
            NativeMemory.Free(copy);
        }
    }

    // Angles in double: in F32 the product of position and frequency already loses digits at position 100.
    private void FillRopeTable()
    {
        double[] frequencies = Config.InverseFrequencies();
        int half = frequencies.Length;
        float[] table = new float[PositionsMax * 2 * half];
        for (int position = 0; position < PositionsMax; position++)
        {
            for (int i = 0; i < half; i++)
            {
                (double sin, double cos) = Math.SinCos(position * frequencies[i]);
                table[(position * 2 * half) + i] = (float)cos;
                table[(position * 2 * half) + half + i] = (float)sin;
            }
        }

        Backend.Upload(table, RopeTable);
    }

    private static void CheckTensor(SafetensorsTensor tensor, in HostMatrix matrix, WeightShape shape)
    {
        if (!tensor.Shape.SequenceEqual(shape.Dimensions))
        {
            throw new InvalidFileException(
                tensor.File, tensor.Name,
                $"has shape [{string.Join(", ", tensor.Shape)}]; config.json asks for [{string.Join(", ", shape.Dimensions)}]");
        }

        long bad = FirstNotFinite(matrix);
        if (bad >= 0)
        {
            throw new InvalidFileException(
                tensor.File, tensor.Name, $"holds NaN or infinity at [{bad / matrix.Columns}, {bad % matrix.Columns}]");
        }
    }

    // An exponent of all ones is NaN or infinity. A row at a time, since spans end at 2 GiB.
    private static unsafe long FirstNotFinite(in HostMatrix matrix)
    {
        for (int row = 0; row < matrix.Rows; row++)
        {
            byte* start = matrix.Data + ((long)row * matrix.Columns * DTypes.BytesOf(matrix.Type));
            bool finite = matrix.Type == DType.F32
                ? float.IsFinite(TensorPrimitives.MaxMagnitude(new ReadOnlySpan<float>(start, matrix.Columns)))
                : !HasExponentOfOnes(new ReadOnlySpan<ushort>(start, matrix.Columns), matrix.Type == DType.BF16 ? 0x7F80 : 0x7C00);
            for (int column = 0; !finite && column < matrix.Columns; column++)
            {
                if (!float.IsFinite(matrix[row, column]))
                {
                    return ((long)row * matrix.Columns) + column;
                }
            }
        }

        return -1;
    }

    private static bool HasExponentOfOnes(ReadOnlySpan<ushort> values, int exponent)
    {
        int found = 0;
        foreach (ushort value in values)
        {
            found |= (value & exponent) == exponent ? 1 : 0;
        }

        return found != 0;
    }

    private T Own<T>(T resource)
        where T : IDisposable
    {
        _owned.Add(resource);
        return resource;
    }
}
