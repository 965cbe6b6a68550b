namespace FlexLLM.Backends;

/// <summary>
/// The largest calls that a backend is going to get: what it sizes its scratch memory by
/// (<see cref="IComputeBackend.ReserveScratch"/>).
/// </summary>
internal readonly record struct ScratchLimits
{
    /// <summary>Most values of a row in a call of <see cref="IComputeBackend.Largest"/>.</summary>
    public const int LargestMax = 128;

    /// <summary>Most rows of a call.</summary>
    public required int Rows { get; init; }

    /// <summary>Most attention segments, and most bypass segments, of a call.</summary>
    public required int Segments { get; init; }

    /// <summary>Longest sequence, in tokens.</summary>
    public required int Positions { get; init; }

    /// <summary>Most rows of a call of <see cref="IComputeBackend.Logits"/>.</summary>
    public required int SampledRows { get; init; }

    /// <summary>Columns of a row that meets the head.</summary>
    public required int HiddenColumns { get; init; }

    /// <summary>Outputs of the head.</summary>
    public required int Vocabulary { get; init; }

    /// <summary>Widest input of any weight.</summary>
    public required int InputColumnsMax { get; init; }

    public required int QueryHeads { get; init; }

    public required int KvHeads { get; init; }

    public required int HeadDim { get; init; }

    /// <summary>Largest rank of <see cref="IComputeBackend.LoraBypass"/>.</summary>
    public required int RankMax { get; init; }

    /// <summary>Largest inner side of any bypass matrix: a rank, or the size of an adapter.</summary>
    public required int InnerMax { get; init; }

    /// <summary>Backward operations and losses are called too; without it they must not be.</summary>
    public required bool Trains { get; init; }
}
