using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>RMSNorm over groups of columns, forward and backward.</summary>
internal static unsafe class NormOps
{
    private const int GroupsPerItem = 16;

    public static void Forward(CpuContext cpu, TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice y)
    {
        Check.That(x.Rows == y.Rows);
        Check.That(x.Columns == y.Columns);
        int groups = GroupsOf(x, gain);
        ForwardJob job = new(CpuTensor.Of(x), ((CpuTensor)gain).Data, epsilon, CpuTensor.Of(y), gain.Columns, groups);
        cpu.Team.Run(job, (groups + GroupsPerItem - 1) / GroupsPerItem, (long)x.Rows * x.Columns);
    }

    public static void Backward(
        CpuContext cpu, TensorSlice x, DeviceTensor gain, float epsilon, TensorSlice dy, TensorSlice dx, bool accumulate)
    {
        Check.That(x.Rows == dy.Rows && x.Rows == dx.Rows);
        Check.That(x.Columns == dy.Columns && x.Columns == dx.Columns);
        int groups = GroupsOf(x, gain);
        BackwardJob job = new(
            CpuTensor.Of(x), ((CpuTensor)gain).Data, epsilon, CpuTensor.Of(dy), CpuTensor.Of(dx), accumulate, gain.Columns,
            groups);
        cpu.Team.Run(job, (groups + GroupsPerItem - 1) / GroupsPerItem, 2L * x.Rows * x.Columns);
    }

    private static int GroupsOf(TensorSlice x, DeviceTensor gain)
    {
        Check.That(gain.Rows == 1 && gain.Columns > 0);
        Check.That(x.Columns % gain.Columns == 0);
        return checked(x.Rows * (x.Columns / gain.Columns));
    }

    [MethodImpl(MethodImplOptions.AggressiveOptimization)]
    private static float InverseRms(float* x, int n, float epsilon) =>
        1f / MathF.Sqrt((VectorMath.Sum(new Squares(x), n) / n) + epsilon);

    private readonly struct Squares(float* x) : IColumnSum
    {
        private readonly float* _x = x;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public Vector256<float> Add(Vector256<float> sum, long column, long count)
        {
            Vector256<float> x = VectorMath.Load(_x + column, count);
            return Vector256.FusedMultiplyAdd(x, x, sum);
        }
    }

    private readonly struct Products(float* dy, float* gain, float* x) : IColumnSum
    {
        private readonly float* _dy = dy;
        private readonly float* _gain = gain;
        private readonly float* _x = x;

        [MethodImpl(MethodImplOptions.AggressiveInlining)]
        public Vector256<float> Add(Vector256<float> sum, long column, long count)
        {
            Vector256<float> scaled = VectorMath.Load(_dy + column, count) * VectorMath.Load(_gain + column, count);
            return Vector256.FusedMultiplyAdd(scaled, VectorMath.Load(_x + column, count), sum);
        }
    }

    // y = x * r * gain
    private readonly struct ForwardJob(float* x, float* gain, float epsilon, float* y, int n, int groups) : IParallelJob
    {
        private readonly float* _x = x;
        private readonly float* _gain = gain;
        private readonly float* _y = y;
        private readonly float _epsilon = epsilon;
        private readonly int _n = n;
        private readonly int _groups = groups;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int end = Math.Min(_groups, (item + 1) * GroupsPerItem);
            for (int group = item * GroupsPerItem; group < end; group++)
            {
                float* x = _x + ((long)group * _n);
                float* y = _y + ((long)group * _n);
                Vector256<float> r = Vector256.Create(InverseRms(x, _n, _epsilon));
                for (int c = 0; c < _n; c += VectorMath.Lanes)
                {
                    VectorMath.Store(Vector256.Load(x + c) * r * Vector256.Load(_gain + c), y + c, _n - c);
                }
            }
        }
    }

    // dx (+)= r * (dy * gain) - x * r^3 / n * sum(dy * gain * x)
    private readonly struct BackwardJob(
        float* x, float* gain, float epsilon, float* dy, float* dx, bool accumulate, int n, int groups) : IParallelJob
    {
        private readonly float* _x = x;
        private readonly float* _gain = gain;
        private readonly float* _dy = dy;
        private readonly float* _dx = dx;
        private readonly float _epsilon = epsilon;
        private readonly bool _accumulate = accumulate;
        private readonly int _n = n;
        private readonly int _groups = groups;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int end = Math.Min(_groups, (item + 1) * GroupsPerItem);
            for (int group = item * GroupsPerItem; group < end; group++)
            {
                float* x = _x + ((long)group * _n);
                float* dy = _dy + ((long)group * _n);
                float* dx = _dx + ((long)group * _n);
                float rms = InverseRms(x, _n, _epsilon);
                float sum = VectorMath.Sum(new Products(dy, _gain, x), _n);
                Vector256<float> r = Vector256.Create(rms);
                Vector256<float> slope = Vector256.Create(-(rms * rms * rms * (sum / _n)));
                for (int c = 0; c < _n; c += VectorMath.Lanes)
                {
                    Vector256<float> direct = Vector256.Load(dy + c) * Vector256.Load(_gain + c) * r;
                    Vector256<float> d = Vector256.FusedMultiplyAdd(Vector256.Load(x + c), slope, direct);
                    VectorMath.Store(_accumulate ? Vector256.Load(dx + c) + d : d, dx + c, _n - c);
                }
            }
        }
    }
}
