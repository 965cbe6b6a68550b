namespace TorchSharp;

public static partial class torch
{
    public partial class Tensor : IDisposable
    {
        internal Tensor()
        {
        }

        public static long TotalCount => throw Contract.NoCode();

        public ScalarType dtype => throw Contract.NoCode();

        public Span<byte> bytes
        {
            get => throw Contract.NoCode();
            set => throw Contract.NoCode();
        }

        public void Dispose() => throw Contract.NoCode();

        public Tensor DetachFromDisposeScope() => throw Contract.NoCode();

        // Where it is, and as what.
        public Tensor cpu() => throw Contract.NoCode();

        public Tensor to(Device device, bool copy = false, bool disposeAfter = false, bool non_blocking = false) =>
            throw Contract.NoCode();

        public Tensor to_type(ScalarType type, bool copy = false, bool disposeAfter = false, bool non_blocking = false) =>
            throw Contract.NoCode();

        public Tensor copy_(Tensor source, bool nonBlocking = false) => throw Contract.NoCode();

        // Views, and a copy where no view will do.
        public Tensor as_strided(long[] size, long[] strides, long storageOffset = 0L) => throw Contract.NoCode();

        public Tensor narrow(long dim, long start, long length) => throw Contract.NoCode();

        public Tensor view(params long[] shape) => throw Contract.NoCode();

        public Tensor reshape(params long[] shape) => throw Contract.NoCode();

        public Tensor permute(params long[] permutation) => throw Contract.NoCode();

        public Tensor transpose(long dim0, long dim1) => throw Contract.NoCode();

        public Tensor t() => throw Contract.NoCode();

        public Tensor triu(long diagonal = 0) => throw Contract.NoCode();

        public Tensor flip(params long[] dims) => throw Contract.NoCode();

        // Indices.
        public Tensor index_select(long dim, Tensor index) => throw Contract.NoCode();

        public Tensor index_copy_(long dim, Tensor index, Tensor source) => throw Contract.NoCode();

        public Tensor argmax(long dim, bool keepdim = false) => throw Contract.NoCode();

        public (Tensor values, Tensor indexes) topk(int k, int dim = -1, bool largest = true, bool sorted = true) =>
            throw Contract.NoCode();

        public Tensor gather(long dim, Tensor index) => throw Contract.NoCode();

        public Tensor scatter_add_(long dim, Tensor index, Tensor src) => throw Contract.NoCode();

        // Products.
        public Tensor mm(Tensor target) => throw Contract.NoCode();

        public Tensor bmm(Tensor batch2) => throw Contract.NoCode();

        public Tensor addmm_(Tensor mat1, Tensor mat2, float beta = 1, float alpha = 1) => throw Contract.NoCode();

        // Element by element.
        public Tensor fill_(Scalar value) => throw Contract.NoCode();

        public Tensor add(Tensor target) => throw Contract.NoCode();

        public Tensor add(Tensor target, Scalar alpha) => throw Contract.NoCode();

        public Tensor add_(Tensor target) => throw Contract.NoCode();

        public Tensor add_(Tensor target, Scalar alpha) => throw Contract.NoCode();

        public Tensor add_(Scalar scalar) => throw Contract.NoCode();

        public Tensor add_(Scalar scalar, Scalar alpha) => throw Contract.NoCode();

        public Tensor sub(Tensor target) => throw Contract.NoCode();

        public Tensor sub(Scalar target) => throw Contract.NoCode();

        public Tensor sub_(Tensor target) => throw Contract.NoCode();

        public Tensor mul(Tensor target) => throw Contract.NoCode();

        public Tensor mul(Scalar target) => throw Contract.NoCode();

        public Tensor mul_(Tensor target) => throw Contract.NoCode();

        public Tensor mul_(Scalar target) => throw Contract.NoCode();

        public Tensor addcmul_(Tensor tensor1, Tensor tensor2, Scalar value) => throw Contract.NoCode();

        public Tensor addcdiv(Tensor tensor1, Tensor tensor2, Scalar value) => throw Contract.NoCode();

        public Tensor addcdiv_(Tensor tensor1, Tensor tensor2, Scalar value) => throw Contract.NoCode();

        public Tensor div_(Tensor target, RoundingMode rounding_mode = RoundingMode.None) => throw Contract.NoCode();

        public Tensor hypot(Tensor other) => throw Contract.NoCode();

        public Tensor exp_() => throw Contract.NoCode();

        public Tensor sqrt() => throw Contract.NoCode();

        public Tensor rsqrt_() => throw Contract.NoCode();

        public Tensor sigmoid() => throw Contract.NoCode();

        public Tensor silu() => throw Contract.NoCode();

        public Tensor silu_() => throw Contract.NoCode();

        public Tensor bitwise_and(Tensor other) => throw Contract.NoCode();

        public Tensor gt(Scalar target) => throw Contract.NoCode();

        public Tensor le(Scalar target) => throw Contract.NoCode();

        public Tensor masked_fill_(Tensor mask, Scalar value) => throw Contract.NoCode();

        public Tensor where(Tensor condition, Tensor y) => throw Contract.NoCode();

        // Reductions.
        public Tensor sum(long dim, bool keepdim = false, ScalarType? type = null) => throw Contract.NoCode();

        public Tensor mean(long[] dimensions, bool keepdim = false, ScalarType? type = null) => throw Contract.NoCode();

        public Tensor norm(int dim, bool keepdim = false, float p = 2.0f) => throw Contract.NoCode();

        public Tensor softmax(long dim, ScalarType? dtype = null) => throw Contract.NoCode();

        public Tensor logsumexp(long dim, bool keepdim = false) => throw Contract.NoCode();
    }
}
