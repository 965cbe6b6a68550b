using FlexLLM.Primitives;

namespace FlexLLM.Backends.Null;

/// <summary>A clock that stands still until somebody moves it. One thread at a time. It has no timers.</summary>
internal sealed class ManualClock : TimeProvider
{
    private TimeSpan _now;

    public override long TimestampFrequency => TimeSpan.TicksPerSecond;

    public override long GetTimestamp() => _now.Ticks;

    public override DateTimeOffset GetUtcNow() => DateTimeOffset.UnixEpoch + _now;

    public override ITimer CreateTimer(TimerCallback callback, object? state, TimeSpan dueTime, TimeSpan period) =>
        throw new NotSupportedException("A timer would follow the machine's time, not this clock's.");

    /// <summary>Moves the clock forward.</summary>
    public void Advance(TimeSpan time)
    {
        Check.That(time >= TimeSpan.Zero);
        _now += time;
    }
}
