using System.Runtime.CompilerServices;
using System.Runtime.Intrinsics;
using FlexLLM.Primitives;

namespace FlexLLM.Backends.Cpu;

/// <summary>
/// Rows made small and large again. A BF16 row of n columns is h = ceil(n / 2) words: word j holds element j in its low and
/// element h + j in its high half (zero behind the last), so that both halves of the row move as whole vectors. A row of sign
/// bits is ceil(n / 32) words: bit b of word j is element 32 j + b, zero behind the last.
/// </summary>
internal static unsafe class PackOps
{
    private const int ElementsPerItem = 1 << 14;
    private const int BitsPerWord = 32;

    private interface IRowPacker
    {
        /// <summary>n elements to words.</summary>
        static abstract void Pack(float* row, uint* words, int n);

        /// <summary>Words to n elements.</summary>
        static abstract void Unpack(uint* words, float* row, int n);
    }

    public static void Pack(CpuContext cpu, TensorSlice source, PackedFormat format, TensorSlice packed) =>
        Run(cpu, source, format, packed, unpack: false);

    public static void Unpack(CpuContext cpu, TensorSlice packed, PackedFormat format, TensorSlice destination) =>
        Run(cpu, destination, format, packed, unpack: true);

    private static void Run(CpuContext cpu, TensorSlice rows, PackedFormat format, TensorSlice packed, bool unpack)
    {
        Check.That(rows.Rows == packed.Rows);
        Check.That(packed.Columns == PackedFormats.PackedColumns(rows.Columns, format));
        if (format == PackedFormat.BF16)
        {
            Run<BF16Rows>(cpu, rows, packed, unpack);
        }
        else
        {
            Run<SignRows>(cpu, rows, packed, unpack);
        }
    }

    private static void Run<TPacker>(CpuContext cpu, TensorSlice rows, TensorSlice packed, bool unpack)
        where TPacker : unmanaged, IRowPacker
    {
        int rowsPerItem = Math.Max(1, ElementsPerItem / Math.Max(1, rows.Columns));
        PackJob<TPacker> job = new(
            CpuTensor.Of(rows), rows.Rows, rows.Columns, (uint*)CpuTensor.Of(packed), packed.Columns, rowsPerItem, unpack);
        cpu.Team.Run(job, (rows.Rows + rowsPerItem - 1) / rowsPerItem, (long)rows.Rows * rows.Columns);
    }

    // One item: a block of rows.
    private readonly struct PackJob<TPacker>(
        float* rows, int rowCount, int columns, uint* packed, int words, int rowsPerItem, bool unpack) : IParallelJob
        where TPacker : unmanaged, IRowPacker
    {
        private readonly float* _rows = rows;
        private readonly uint* _packed = packed;
        private readonly int _rowCount = rowCount;
        private readonly int _columns = columns;
        private readonly int _words = words;
        private readonly int _rowsPerItem = rowsPerItem;
        private readonly bool _unpack = unpack;

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public void Run(int item, int worker)
        {
            int end = Math.Min(_rowCount, (item + 1) * _rowsPerItem);
            for (int i = item * _rowsPerItem; i < end; i++)
            {
                float* row = _rows + ((long)i * _columns);
                uint* words = _packed + ((long)i * _words);
                if (_unpack)
                {
                    TPacker.Unpack(words, row, _columns);
                }
                else
                {
                    TPacker.Pack(row, words, _columns);
                }
            }
        }
    }

    private readonly struct BF16Rows : IRowPacker
    {
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public static void Pack(float* row, uint* words, int n)
        {
            int half = (n + 1) / 2;
            for (int j = 0; j < half; j += VectorMath.Lanes)
            {
                Vector256<float> high = VectorMath.Load(row + half + j, Math.Max(0, n - half - j));
                VectorMath.Store(BF16Panel.Join(Vector256.Load(row + j), high), (float*)words + j, half - j);
            }
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public static void Unpack(uint* words, float* row, int n)
        {
            int half = (n + 1) / 2;
            for (int j = 0; j < half; j += VectorMath.Lanes)
            {
                VectorMath.Store(BF16Panel.Low((byte*)(words + j)), row + j, half - j);
                VectorMath.Store(BF16Panel.High((byte*)(words + j)), row + half + j, n - half - j);
            }
        }
    }

    private readonly struct SignRows : IRowPacker
    {
        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public static void Pack(float* row, uint* words, int n)
        {
            for (int start = 0; start < n; start += BitsPerWord)
            {
                uint word = 0;
                for (int c = start; c < Math.Min(n, start + BitsPerWord); c += VectorMath.Lanes)
                {
                    Vector256<float> above = Vector256.GreaterThan(VectorMath.Load(row + c, n - c), Vector256<float>.Zero);
                    word |= above.ExtractMostSignificantBits() << (c - start);
                }

                words[start / BitsPerWord] = word;
            }
        }

        [MethodImpl(MethodImplOptions.AggressiveOptimization)]
        public static void Unpack(uint* words, float* row, int n)
        {
            Vector256<uint> bits = Vector256.Create(1u, 2, 4, 8, 16, 32, 64, 128);
            for (int c = 0; c < n; c += VectorMath.Lanes)
            {
                Vector256<uint> word = Vector256.Create(words[c / BitsPerWord] >> (c % BitsPerWord));
                Vector256<float> isSet = Vector256.Equals(word & bits, bits).AsSingle();
                VectorMath.Store(isSet & Vector256<float>.One, row + c, n - c);
            }
        }
    }
}
