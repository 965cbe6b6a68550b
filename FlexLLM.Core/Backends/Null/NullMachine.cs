namespace FlexLLM.Backends.Null;

/// <summary>
/// Speed of a machine that does not exist. A call takes SecondsPerCall and then as long as the slower of arithmetic and
/// memory traffic (the roofline model).
/// </summary>
internal sealed record NullMachine
{
    /// <summary>Floating-point operations; a multiply and an add are two.</summary>
    public required double FlopsPerSecond { get; init; }

    public required double BytesPerSecond { get; init; }

    /// <summary>Overhead of a call.</summary>
    public double SecondsPerCall { get; init; }

    /// <summary>Standard deviation of the logarithm of the machine's slowness; 0 for none.</summary>
    public double Jitter { get; init; }

    /// <summary>How long, in its own time, the machine keeps a slowness before it draws another.</summary>
    public TimeSpan JitterPeriod { get; init; } = TimeSpan.FromMilliseconds(10);
}
