using FlexLLM.Graph.Parallelization;
using FlexLLM.Primitives;

namespace FlexLLM.Tests.Graph.Parallelization;

/// <summary>Tensors as one array per rank, and the parallel operators as copies and sums between the arrays.</summary>
internal static class SimulatedRanks
{
    public static double[][,] Distribute(double[,] value, TensorLayout layout, int ranks, ref SeededRandom random)
    {
        if (layout != TensorLayout.PreReduce)
        {
            return PerRank(ranks, rank => Slice(value, layout, rank, ranks));
        }

        double[][,] parts = new double[ranks][,];
        double[,] rest = value;
        for (int rank = 1; rank < ranks; rank++)
        {
            parts[rank] = Dense.Random(value.GetLength(0), value.GetLength(1), ref random);
            rest = Dense.Map(rest, parts[rank], (a, b) => a - b);
        }

        parts[0] = rest;
        return parts;
    }

    /// <summary>The value that the ranks hold together; copies that differ are no value (NaN).</summary>
    public static double[,] Assemble(double[][,] local, TensorLayout layout)
    {
        if (layout == TensorLayout.PreReduce)
        {
            return Sum(local);
        }

        if (layout.IsSplit)
        {
            return Dense.Concat(local, alongRows: layout == TensorLayout.SplitRows);
        }

        bool isValue = layout == TensorLayout.Whole || local.All(copy => Dense.Distance(copy, local[0]) < 1e-9);
        return isValue ? local[0] : Dense.Map(local[0], local[0], (_, _) => double.NaN);
    }

    /// <summary>Runs one operator. A whole tensor lies on rank 0 unless it is said to lie everywhere.</summary>
    public static double[][,] Apply(ParallelOperator op, double[][,] local, bool sourceEverywhere)
    {
        int ranks = local.Length;
        double[,] value = Assemble(local, op.From);
        return op.Kind switch
        {
            ParallelOperatorKind.Combine or ParallelOperatorKind.Reduce =>
                PerRank(ranks, rank => rank == 0 ? value : Dense.Map(value, value, (_, _) => double.NaN)),
            _ => PerRank(ranks, rank => Slice(sourceEverywhere ? local[rank] : value, op.To, rank, ranks)),
        };
    }

    /// <summary>The part of a full tensor that a rank has; all of it unless the layout is split. Slices may be ragged.</summary>
    public static double[,] Slice(double[,] full, TensorLayout layout, int rank, int ranks)
    {
        (int rows, int columns) = (full.GetLength(0), full.GetLength(1));
        (int firstRow, int endRow) = layout == TensorLayout.SplitRows ? Bounds(rows) : (0, rows);
        (int firstColumn, int endColumn) = layout == TensorLayout.SplitColumns ? Bounds(columns) : (0, columns);
        return Dense.Build(endRow - firstRow, endColumn - firstColumn, (i, j) => full[firstRow + i, firstColumn + j]);

        (int First, int End) Bounds(int size) => (size * rank / ranks, size * (rank + 1) / ranks);
    }

    /// <summary>A rank's slice of a tensor as a contribution to a sum: zeros elsewhere.</summary>
    public static double[,] Embed(double[,] part, TensorLayout layout, int rank, int ranks, int rows, int columns)
    {
        int firstRow = layout == TensorLayout.SplitRows ? rows * rank / ranks : 0;
        int firstColumn = layout == TensorLayout.SplitColumns ? columns * rank / ranks : 0;
        double[,] full = new double[rows, columns];
        for (int i = 0; i < part.GetLength(0); i++)
        {
            for (int j = 0; j < part.GetLength(1); j++)
            {
                full[firstRow + i, firstColumn + j] = part[i, j];
            }
        }

        return full;
    }

    public static double[,] Sum(double[][,] parts) => parts.Aggregate(Dense.Plus);

    public static double[][,] PerRank(int ranks, Func<int, double[,]> build) => [.. Enumerable.Range(0, ranks).Select(build)];
}

/// <summary>Plain dense matrices.</summary>
internal static class Dense
{
    public static double[,] Build(int rows, int columns, Func<int, int, double> element)
    {
        double[,] result = new double[rows, columns];
        for (int i = 0; i < rows; i++)
        {
            for (int j = 0; j < columns; j++)
            {
                result[i, j] = element(i, j);
            }
        }

        return result;
    }

    public static double[,] Random(int rows, int columns, ref SeededRandom random)
    {
        double[,] result = new double[rows, columns];
        foreach (int i in Enumerable.Range(0, result.Length))
        {
            result[i / columns, i % columns] = random.NextGaussian();
        }

        return result;
    }

    public static double[,] Map(double[,] a, double[,] b, Func<double, double, double> function)
    {
        Check.That(a.GetLength(0) == b.GetLength(0) && a.GetLength(1) == b.GetLength(1));
        return Build(a.GetLength(0), a.GetLength(1), (i, j) => function(a[i, j], b[i, j]));
    }

    public static double[,] Plus(double[,] a, double[,] b) => Map(a, b, (x, y) => x + y);

    public static double[,] Transpose(double[,] a) => Build(a.GetLength(1), a.GetLength(0), (i, j) => a[j, i]);

    public static double[,] Product(double[,] a, double[,] b)
    {
        Check.That(a.GetLength(1) == b.GetLength(0));
        return Build(a.GetLength(0), b.GetLength(1), (i, j) =>
        {
            double sum = 0;
            for (int k = 0; k < a.GetLength(1); k++)
            {
                sum += a[i, k] * b[k, j];
            }

            return sum;
        });
    }

    public static double[,] Concat(double[][,] parts, bool alongRows)
    {
        if (!alongRows)
        {
            return Transpose(Concat([.. parts.Select(Transpose)], alongRows: true));
        }

        double[][] rows = [.. parts.SelectMany(part => Enumerable.Range(0, part.GetLength(0)).Select(i => Row(part, i)))];
        return Build(rows.Length, parts[0].GetLength(1), (i, j) => rows[i][j]);
    }

    /// <summary>The largest absolute difference; infinite where a number is missing.</summary>
    public static double Distance(double[,] a, double[,] b)
    {
        double[,] differences = Map(a, b, (x, y) => double.IsNaN(x - y) ? double.PositiveInfinity : Math.Abs(x - y));
        return differences.Cast<double>().DefaultIfEmpty().Max();
    }

    private static double[] Row(double[,] a, int i) => [.. Enumerable.Range(0, a.GetLength(1)).Select(j => a[i, j])];
}
