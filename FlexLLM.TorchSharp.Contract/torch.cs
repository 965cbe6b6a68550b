namespace TorchSharp;

public static partial class torch
{
    public enum ScalarType : sbyte
    {
        Byte = 0,
        Int8 = 1,
        Int16 = 2,
        Int32 = 3,
        Int64 = 4,
        Float16 = 5,
        Float32 = 6,
        Float64 = 7,
        ComplexFloat32 = 9,
        ComplexFloat64 = 10,
        Bool = 11,
        BFloat16 = 15,
    }

    public enum RoundingMode
    {
        None,
        trunc,
        floor,
    }

    public static void InitializeDeviceType(DeviceType deviceType) => throw Contract.NoCode();

    public static void CheckForErrors() => throw Contract.NoCode();

    public static DisposeScope NewDisposeScope() => throw Contract.NoCode();

    public static Tensor empty(
        long size, ScalarType? dtype = null, Device? device = null, bool requires_grad = false, string[]? names = null) =>
        throw Contract.NoCode();

    public static Tensor empty(
        long rows, long columns, ScalarType? dtype = null, Device? device = null, bool requires_grad = false,
        string[]? names = null) =>
        throw Contract.NoCode();

    public static Tensor empty(
        long dim0, long dim1, long dim2, ScalarType? dtype = null, Device? device = null, bool requires_grad = false,
        string[]? names = null) =>
        throw Contract.NoCode();

    public static Tensor zeros(
        long rows, long columns, ScalarType? dtype = null, Device? device = null, bool requires_grad = false,
        string[]? names = null) =>
        throw Contract.NoCode();

    public static Tensor ones(
        long rows, long columns, ScalarType? dtype = null, Device? device = null, bool requires_grad = false,
        string[]? names = null) =>
        throw Contract.NoCode();

    public static Tensor cat(IList<Tensor> tensors, long dim = 0) => throw Contract.NoCode();

    public static partial class nn
    {
        public static partial class functional
        {
            public static Tensor scaled_dot_product_attention(
                Tensor query, Tensor key, Tensor value, Tensor? attn_mask = null, double p = 0.0, bool is_casual = false) =>
                throw Contract.NoCode();
        }
    }

    public static partial class cuda
    {
        public static bool is_available() => throw Contract.NoCode();

        public static int device_count() => throw Contract.NoCode();

        public static void synchronize(Device? device = null) => throw Contract.NoCode();
    }

    public static partial class backends
    {
        public static partial class cuda
        {
            public static partial class matmul
            {
                public static bool allow_tf32
                {
                    get => throw Contract.NoCode();
                    set => throw Contract.NoCode();
                }
            }
        }

        public static partial class cudnn
        {
            public static bool allow_tf32
            {
                get => throw Contract.NoCode();
                set => throw Contract.NoCode();
            }
        }
    }

    public class Device
    {
        public Device(DeviceType deviceType, int index = -1) => throw Contract.NoCode();

        public DeviceType type => throw Contract.NoCode();

        public int index => throw Contract.NoCode();
    }
}

public enum DeviceType
{
    CPU = 0,
    CUDA = 1,
}

public sealed class DisposeScope : IDisposable
{
    internal DisposeScope()
    {
    }

    public void Dispose() => throw Contract.NoCode();
}

public class DisposeScopeManager
{
    public static ThreadDisposeScopeStatistics Statistics => throw Contract.NoCode();
}

public class ThreadDisposeScopeStatistics
{
    public long CreatedInScopeCount => throw Contract.NoCode();

    public long CreatedOutsideScopeCount => throw Contract.NoCode();
}

public sealed class Scalar : IDisposable
{
    internal Scalar()
    {
    }

    public static implicit operator Scalar(double value) => throw Contract.NoCode();

    public void Dispose() => throw Contract.NoCode();
}
