namespace FlexLLM.Tests.Support;

/// <summary>Keeps an engine's loop between two steps, so that whatever a test sends meanwhile is there at once.</summary>
internal sealed class HeldLoop : IDisposable
{
    private readonly ManualResetEventSlim _released = new(false);

    private HeldLoop()
    {
    }

    public static HeldLoop Of(CoServingEngine engine)
    {
        var held = new HeldLoop();
        _ = engine.CallAsync(_ => held._released.Wait(Waiting.TimeoutMax), CancellationToken.None);
        return held;
    }

    /// <summary>Lets the loop go on.</summary>
    public void Dispose() => _released.Set();
}
