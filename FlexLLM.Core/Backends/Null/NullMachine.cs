namespace FlexLLM.Backends.Null;

/// <summary>
/// Speed of a machine that does not exist. A call takes SecondsPerCall and then as long as the slower of arithmetic and
/// memory traffic (the roofline model), or as both where they do not overlap. Several ranks that divide every call are one
/// machine with the sum of their rates; what they wait for each other belongs to SecondsPerBatch.
/// </summary>
internal sealed record NullMachine
{
    /// <summary>Floating-point operations; a multiply and an add are two.</summary>
    public required double FlopsPerSecond { get; init; }

    public required double BytesPerSecond { get; init; }

    /// <summary>Overhead of a call.</summary>
    public double SecondsPerCall { get; init; }

    /// <summary>Overhead of a batch: what the host does before the first call, and what ranks wait for each other.</summary>
    public double SecondsPerBatch { get; init; }

    /// <summary>Whether arithmetic hides memory traffic. A device whose products of few rows reach neither peak does not.</summary>
    public bool Overlaps { get; init; } = true;

    /// <summary>Bytes that an element of activations, keys and values moves: 4, or 2 on a device that holds them in BF16.</summary>
    public int ElementBytes { get; init; } = sizeof(float);

    /// <summary>Standard deviation of the logarithm of the machine's slowness; 0 for none.</summary>
    public double Jitter { get; init; }

    /// <summary>How long, in its own time, the machine keeps a slowness before it draws another.</summary>
    public TimeSpan JitterPeriod { get; init; } = TimeSpan.FromMilliseconds(10);
}
