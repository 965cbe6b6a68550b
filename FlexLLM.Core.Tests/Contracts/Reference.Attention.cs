namespace FlexLLM.Tests.Contracts;

/// <summary>How query and KV heads lie in a row.</summary>
internal readonly record struct HeadShape(int KvHeads, int Group, int HeadDim)
{
    public int QueryHeads => KvHeads * Group;

    public int QueryColumns => QueryHeads * HeadDim;

    public int KvColumns => KvHeads * HeadDim;

    /// <summary>As it stands in the names of tests.</summary>
    public override string ToString() => $"{KvHeads}x{Group}x{HeadDim}";
}

/// <summary>
/// Causal attention of the rows [start, start + q.Rows) of one sequence over k, v [positions, kvHeads * headDim].
/// </summary>
internal static partial class Reference
{
    /// <summary>o, and the log-sum-exp [rows, query heads] of the scaled scores.</summary>
    public static (Matrix O, Matrix LogSumExp) Attention(Matrix q, Matrix k, Matrix v, int start, HeadShape shape)
    {
        var o = new Matrix(q.Rows, q.Columns);
        var logSumExp = new Matrix(q.Rows, shape.QueryHeads);
        for (int head = 0; head < shape.QueryHeads; head++)
        {
            int kvHead = head / shape.Group;
            for (int row = 0; row < q.Rows; row++)
            {
                double[] scores = Scores(q, k, row, start + row, head, shape);
                double lse = logSumExp[row, head] = LogSumExp(scores);
                for (int j = 0; j < scores.Length; j++)
                {
                    double p = Math.Exp(scores[j] - lse);
                    for (int c = 0; c < shape.HeadDim; c++)
                    {
                        o[row, (head * shape.HeadDim) + c] += p * v[j, (kvHead * shape.HeadDim) + c];
                    }
                }
            }
        }

        return (o, logSumExp);
    }

    /// <summary>Gradients of q, and of k and v at the positions [0, start + q.Rows) (paper, d.3).</summary>
    public static (Matrix DQ, Matrix DK, Matrix DV) AttentionBackward(
        Matrix q, Matrix k, Matrix v, Matrix dO, int start, HeadShape shape) =>
        AttentionBackward(Probabilities(q, k, start, shape), q, k, v, dO, start, shape, -1);

    public static (Matrix DQ, Matrix DK, Matrix DV) AttentionBackwardMagnitude(
        Matrix q, Matrix k, Matrix v, Matrix dO, int start, HeadShape shape) =>
        AttentionBackward(Probabilities(q, k, start, shape), q.Abs(), k.Abs(), v.Abs(), dO.Abs(), start, shape, +1);

    /// <summary>
    /// Largest sum |q||k| / sqrt(headDim) of any score: it turns roundings of scores into relative errors of P.
    /// </summary>
    public static double ScoreMagnitude(Matrix q, Matrix k, int start, HeadShape shape)
    {
        (Matrix absQ, Matrix absK) = (q.Abs(), k.Abs());
        double max = 0;
        for (int head = 0; head < shape.QueryHeads; head++)
        {
            for (int row = 0; row < q.Rows; row++)
            {
                max = Math.Max(max, Scores(absQ, absK, row, start + row, head, shape).Max());
            }
        }

        return max;
    }

    private static (Matrix DQ, Matrix DK, Matrix DV) AttentionBackward(
        Matrix[] probabilities, Matrix q, Matrix k, Matrix v, Matrix dO, int start, HeadShape shape, int minus)
    {
        int d = shape.HeadDim;
        double scale = 1 / Math.Sqrt(d);
        var dQ = new Matrix(q.Rows, q.Columns);
        var dK = new Matrix(start + q.Rows, shape.KvColumns);
        var dV = new Matrix(start + q.Rows, shape.KvColumns);
        for (int head = 0; head < shape.QueryHeads; head++)
        {
            Matrix p = probabilities[head];
            int at = head * d;
            int kvAt = head / shape.Group * d;
            for (int row = 0; row < q.Rows; row++)
            {
                int end = start + row + 1;
                double[] dP = new double[end];
                double delta = 0;
                for (int j = 0; j < end; j++)
                {
                    for (int c = 0; c < d; c++)
                    {
                        dP[j] += dO[row, at + c] * v[j, kvAt + c];
                        dV[j, kvAt + c] += p[row, j] * dO[row, at + c];
                    }

                    delta += p[row, j] * dP[j];
                }

                for (int j = 0; j < end; j++)
                {
                    double dS = p[row, j] * (dP[j] + (minus * delta));
                    for (int c = 0; c < d; c++)
                    {
                        dQ[row, at + c] += scale * dS * k[j, kvAt + c];
                        dK[j, kvAt + c] += scale * dS * q[row, at + c];
                    }
                }
            }
        }

        return (dQ, dK, dV);
    }

    // One matrix [rows, positions] a head; zero above the diagonal.
    private static Matrix[] Probabilities(Matrix q, Matrix k, int start, HeadShape shape)
    {
        var all = new Matrix[shape.QueryHeads];
        for (int head = 0; head < all.Length; head++)
        {
            all[head] = new Matrix(q.Rows, start + q.Rows);
            for (int row = 0; row < q.Rows; row++)
            {
                double[] scores = Scores(q, k, row, start + row, head, shape);
                double lse = LogSumExp(scores);
                for (int j = 0; j < scores.Length; j++)
                {
                    all[head][row, j] = Math.Exp(scores[j] - lse);
                }
            }
        }

        return all;
    }

    private static double[] Scores(Matrix q, Matrix k, int row, int position, int head, HeadShape shape)
    {
        int d = shape.HeadDim;
        double[] scores = new double[position + 1];
        for (int j = 0; j <= position; j++)
        {
            for (int c = 0; c < d; c++)
            {
                scores[j] += q[row, (head * d) + c] * k[j, (head / shape.Group * d) + c];
            }

            scores[j] /= Math.Sqrt(d);
        }

        return scores;
    }

    private static double LogSumExp(double[] values)
    {
        double max = values.Max();
        return max + Math.Log(values.Sum(value => Math.Exp(value - max)));
    }
}
