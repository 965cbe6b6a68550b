using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>Operations on elements at equal places: gate, add, optimizer steps; and the rotation of heads.</summary>
internal static unsafe class ElementwiseOps
{
    // Elements in an item: a multiple of the lanes.
    private const long ElementsPerItem = 1 << 14;

    /// <summary>What happens to the elements [start, start + min(count, 8)): loads first, then stores.</summary>
    private interface IElementwise
    {
        void Apply(long start, long count);
    }

    public static void SiluGate(CpuContext cpu, TensorSlice gate, TensorSlice up, TensorSlice y)
    {
        Check.That(Alike(gate, up) && Alike(gate, y));
        Run(cpu, new SiluGateOp(CpuTensor.Of(gate), CpuTensor.Of(up), CpuTensor.Of(y)), Count(y), 8);
    }

    public static void SiluGateBackward(
        CpuContext cpu, TensorSlice gate, TensorSlice up, TensorSlice dy, TensorSlice dGate, TensorSlice dUp)
    {
        Check.That(Alike(gate, up) && Alike(gate, dy) && Alike(gate, dGate) && Alike(gate, dUp));
        SiluGateBackwardOp op = new(
            CpuTensor.Of(gate), CpuTensor.Of(up), CpuTensor.Of(dy), CpuTensor.Of(dGate), CpuTensor.Of(dUp));
        Run(cpu, op, Count(dy), 8);
    }

    public static void Add(CpuContext cpu, TensorSlice a, TensorSlice b, TensorSlice y)
    {
        Check.That(Alike(a, b) && Alike(a, y));
        Run(cpu, new AddOp(CpuTensor.Of(a), CpuTensor.Of(b), CpuTensor.Of(y)), Count(y), 1);
    }

    public static void Relu(CpuContext cpu, TensorSlice x, TensorSlice y)
    {
        Check.That(Alike(x, y));
        Run(cpu, new ReluOp(CpuTensor.Of(x), CpuTensor.Of(y)), Count(y), 1);
    }

    public static void ReluBackward(CpuContext cpu, TensorSlice y, TensorSlice dy, TensorSlice dx)
    {
        Check.That(Alike(y, dy) && Alike(y, dx));
        Run(cpu, new ReluBackwardOp(CpuTensor.Of(y), CpuTensor.Of(dy), CpuTensor.Of(dx)), Count(dx), 1);
    }

    public static void Silu(CpuContext cpu, TensorSlice x, TensorSlice y)
    {
        Check.That(Alike(x, y));
        Run(cpu, new SiluOp(CpuTensor.Of(x), CpuTensor.Of(y)), Count(y), 8);
    }

    public static void SiluBackward(CpuContext cpu, TensorSlice x, TensorSlice dy, TensorSlice dx)
    {
        Check.That(Alike(x, dy) && Alike(x, dx));
        Run(cpu, new SiluBackwardOp(CpuTensor.Of(x), CpuTensor.Of(dy), CpuTensor.Of(dx)), Count(dx), 8);
    }

    public static void SgdStep(
        CpuContext cpu, DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options)
    {
        Check.That(Alike(parameter, gradient));
        Check.That(options.Momentum == 0 ? velocity is null : velocity is not null && Alike(parameter, velocity));
        SgdOp op = new(
            CpuTensor.Of(parameter), CpuTensor.Of(gradient), velocity is null ? null : CpuTensor.Of(velocity), options);
        Run(cpu, op, Count(parameter), 1);
    }

    public static void AdamWStep(
        CpuContext cpu, DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2,
        in AdamWStepOptions options)
    {
        Check.That(Alike(parameter, gradient) && Alike(parameter, moment1) && Alike(parameter, moment2));
        Check.That(options.Step >= 1);
        AdamWOp op = new(
            CpuTensor.Of(parameter), CpuTensor.Of(gradient), CpuTensor.Of(moment1), CpuTensor.Of(moment2), options);
        Run(cpu, op, Count(parameter), 4);
    }

    public static void Rope(CpuContext cpu, TensorSlice x, ReadOnlySpan<int> positions, DeviceTensor table, bool inverse)
    {
        Check.That(positions.Length == x.Rows);
        Check.That(table.Columns > 0 && table.Columns % 2 == 0);
        Check.That(x.Columns % table.Columns == 0);
        foreach (int position in positions)
        {
            Check.That(position >= 0 && position < table.Rows);
        }

        fixed (int* first = positions)
        {
            RopeJob job = new(CpuTensor.Of(x), x.Columns, first, ((CpuTensor)table).Data, table.Columns, inverse);
            cpu.Team.Run(job, x.Rows, (long)x.Rows * x.Columns);
        }
    }

    // 1 + x * (1 - s): the derivative of x * s is s times this.
    [MethodImpl(MethodImplOptions.AggressiveInlining)]
    private static Vector256<float> SiluSlope(Vector256<float> x, Vector256<float> s) =>
        Vector256.FusedMultiplyAdd(x, Vector256<float>.One - s, Vector256<float>.One);

    private static bool Alike(TensorSlice a, TensorSlice b) => a.Rows == b.Rows && a.Columns == b.Columns;

    private static long Count(TensorSlice slice) => (long)slice.Rows * slice.Columns;

    private static void Run<TOp>(CpuContext cpu, TOp op, long count, int cost)
        where TOp : unmanaged, IElementwise =>
        cpu.Team.Run(
            new ElementwiseJob<TOp>(op, count), checked((int)((count + ElementsPerItem - 1) / ElementsPerItem)), count * cost);

    private readonly struct ElementwiseJob<TOp>(TOp op, long count) : IParallelJob
        where TOp : unmanaged, IElementwise
    {
        private readonly TOp _op = op;
        private readonly long _count = count;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            TOp op = _op;
            long end = Math.Min(_count, (item + 1) * ElementsPerItem);
            long i = item * ElementsPerItem;
            for (; i + VectorMath.Lanes <= end; i += VectorMath.Lanes)
            {
                op.Apply(i, VectorMath.Lanes);
            }

            if (i < end)
            {
                op.Apply(i, end - i);
            }
        }
    }

    private readonly struct AddOp(float* a, float* b, float* y) : IElementwise
    {
        private readonly float* _a = a;
        private readonly float* _b = b;
        private readonly float* _y = y;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count) =>
            VectorMath.Store(Vector256.Load(_a + start) + Vector256.Load(_b + start), _y + start, count);
    }

    // y = gate * sigmoid(gate) * up
    private readonly struct SiluGateOp(float* gate, float* up, float* y) : IElementwise
    {
        private readonly float* _gate = gate;
        private readonly float* _up = up;
        private readonly float* _y = y;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> gate = Vector256.Load(_gate + start);
            VectorMath.Store(gate * VectorMath.Sigmoid(gate) * Vector256.Load(_up + start), _y + start, count);
        }
    }

    // dGate = dy * up * s * (1 + gate * (1 - s)), dUp = dy * gate * s
    private readonly struct SiluGateBackwardOp(float* gate, float* up, float* dy, float* dGate, float* dUp) : IElementwise
    {
        private readonly float* _gate = gate;
        private readonly float* _up = up;
        private readonly float* _dy = dy;
        private readonly float* _dGate = dGate;
        private readonly float* _dUp = dUp;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> gate = Vector256.Load(_gate + start);
            Vector256<float> dy = Vector256.Load(_dy + start);
            Vector256<float> s = VectorMath.Sigmoid(gate);
            Vector256<float> dGate = dy * Vector256.Load(_up + start) * s * SiluSlope(gate, s);
            Vector256<float> dUp = dy * gate * s;
            VectorMath.Store(dGate, _dGate + start, count);
            VectorMath.Store(dUp, _dUp + start, count);
        }
    }

    // y = x <= 0 ? 0 : x, so that NaN stays NaN and -0 becomes 0
    private readonly struct ReluOp(float* x, float* y) : IElementwise
    {
        private readonly float* _x = x;
        private readonly float* _y = y;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> x = Vector256.Load(_x + start);
            Vector256<float> off = Vector256.LessThanOrEqual(x, Vector256<float>.Zero);
            VectorMath.Store(Vector256.AndNot(x, off), _y + start, count);
        }
    }

    // dx = y > 0 ? dy : 0
    private readonly struct ReluBackwardOp(float* y, float* dy, float* dx) : IElementwise
    {
        private readonly float* _y = y;
        private readonly float* _dy = dy;
        private readonly float* _dx = dx;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> on = Vector256.GreaterThan(Vector256.Load(_y + start), Vector256<float>.Zero);
            VectorMath.Store(Vector256.Load(_dy + start) & on, _dx + start, count);
        }
    }

    // y = x * sigmoid(x)
    private readonly struct SiluOp(float* x, float* y) : IElementwise
    {
        private readonly float* _x = x;
        private readonly float* _y = y;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> x = Vector256.Load(_x + start);
            VectorMath.Store(x * VectorMath.Sigmoid(x), _y + start, count);
        }
    }

    // dx = dy * s * (1 + x * (1 - s))
    private readonly struct SiluBackwardOp(float* x, float* dy, float* dx) : IElementwise
    {
        private readonly float* _x = x;
        private readonly float* _dy = dy;
        private readonly float* _dx = dx;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> x = Vector256.Load(_x + start);
            Vector256<float> s = VectorMath.Sigmoid(x);
            VectorMath.Store(Vector256.Load(_dy + start) * s * SiluSlope(x, s), _dx + start, count);
        }
    }

    private readonly struct SgdOp(float* parameter, float* gradient, float* velocity, SgdStepOptions options) : IElementwise
    {
        private readonly float* _parameter = parameter;
        private readonly float* _gradient = gradient;
        private readonly float* _velocity = velocity;
        private readonly SgdStepOptions _options = options;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> p = Vector256.Load(_parameter + start);
            Vector256<float> g = Vector256.FusedMultiplyAdd(
                p, Vector256.Create(_options.WeightDecay), Vector256.Load(_gradient + start));
            if (_velocity != null)
            {
                Vector256<float> momentum = Vector256.Create(_options.Momentum);
                Vector256<float> v = Vector256.FusedMultiplyAdd(momentum, Vector256.Load(_velocity + start), g);
                VectorMath.Store(v, _velocity + start, count);
                g = _options.Nesterov ? Vector256.FusedMultiplyAdd(momentum, v, g) : v;
            }

            VectorMath.Store(
                Vector256.FusedMultiplyAdd(g, Vector256.Create(-_options.LearningRate), p), _parameter + start, count);
        }
    }

    private readonly struct AdamWOp(float* parameter, float* gradient, float* moment1, float* moment2, AdamWStepOptions options)
        : IElementwise
    {
        private readonly float* _parameter = parameter;
        private readonly float* _gradient = gradient;
        private readonly float* _moment1 = moment1;
        private readonly float* _moment2 = moment2;
        private readonly AdamWStepOptions _options = options;
        private readonly float _decay = (float)(1.0 - ((double)options.LearningRate * options.WeightDecay));
        private readonly float _stepSize = (float)(options.LearningRate / (1.0 - Math.Pow(options.Beta1, options.Step)));
        private readonly float _rootCorrection = (float)Math.Sqrt(1.0 - Math.Pow(options.Beta2, options.Step));

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public void Apply(long start, long count)
        {
            Vector256<float> g = Vector256.Load(_gradient + start);
            Vector256<float> m = Vector256.FusedMultiplyAdd(
                Vector256.Create(1f - _options.Beta1), g, Vector256.Create(_options.Beta1) * Vector256.Load(_moment1 + start));
            Vector256<float> kept = Vector256.Create(_options.Beta2) * Vector256.Load(_moment2 + start);
            Vector256<float> v = Vector256.FusedMultiplyAdd(Vector256.Create(1f - _options.Beta2) * g, g, kept);
            Vector256<float> denominator =
                (Vector256.Sqrt(v) / Vector256.Create(_rootCorrection)) + Vector256.Create(_options.Epsilon);
            Vector256<float> p = Vector256.Load(_parameter + start) * Vector256.Create(_decay);
            VectorMath.Store(m, _moment1 + start, count);
            VectorMath.Store(v, _moment2 + start, count);
            VectorMath.Store(p - (Vector256.Create(_stepSize) * (m / denominator)), _parameter + start, count);
        }
    }

    // One item: one row.
    private readonly struct RopeJob(float* x, int columns, int* positions, float* table, int headDim, bool inverse)
        : IParallelJob
    {
        private readonly float* _x = x;
        private readonly int _columns = columns;
        private readonly int* _positions = positions;
        private readonly float* _table = table;
        private readonly int _headDim = headDim;
        private readonly bool _inverse = inverse;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int half = _headDim / 2;
            float* cos = _table + ((long)_positions[item] * _headDim);
            float* row = _x + ((long)item * _columns);
            for (float* head = row; head < row + _columns; head += _headDim)
            {
                for (int i = 0; i < half; i += VectorMath.Lanes)
                {
                    Vector256<float> c = Vector256.Load(cos + i);
                    Vector256<float> s = Vector256.Load(cos + half + i);
                    s = _inverse ? -s : s;
                    Vector256<float> left = Vector256.Load(head + i);
                    Vector256<float> right = Vector256.Load(head + half + i);
                    VectorMath.Store(Vector256.FusedMultiplyAdd(left, c, -(right * s)), head + i, half - i);
                    VectorMath.Store(Vector256.FusedMultiplyAdd(right, c, left * s), head + half + i, half - i);
                }
            }
        }
    }
}
