using Microsoft.Extensions.Logging;

namespace FlexLLM.Engine;

/// <summary>The host's logger as the loop thread may use it: what it throws is not the engine's fault and stops nothing.</summary>
internal sealed class GuardedLogger(ILogger inner) : ILogger
{
    public IDisposable? BeginScope<TState>(TState state)
        where TState : notnull => null;

    public bool IsEnabled(LogLevel logLevel)
    {
        try
        {
            return inner.IsEnabled(logLevel);
        }
#pragma warning disable CA1031 // Any exception at all is the host's.
        catch
#pragma warning restore CA1031
        {
            return false;
        }
    }

    public void Log<TState>(
        LogLevel logLevel, EventId eventId, TState state, Exception? exception, Func<TState, Exception?, string> formatter)
    {
        try
        {
            inner.Log(logLevel, eventId, state, exception, formatter);
        }
#pragma warning disable CA1031 // Any exception at all is the host's.
        catch
#pragma warning restore CA1031
        {
            // There is nobody to tell: this was the one to tell.
        }
    }
}
