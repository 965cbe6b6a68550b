namespace FlexLLM.Tests.Support;

/// <summary>Every await of an engine's test ends: what hangs is a failure, not a stuck build.</summary>
internal static class Waiting
{
    public static readonly TimeSpan TimeoutMax = TimeSpan.FromSeconds(60);

    public static Task Soon(this Task task) => task.WaitAsync(TimeoutMax);

    public static Task<T> Soon<T>(this Task<T> task) => task.WaitAsync(TimeoutMax);

    public static Task Soon(this ValueTask task) => task.AsTask().WaitAsync(TimeoutMax);

    public static Task<T> Soon<T>(this ValueTask<T> task) => task.AsTask().WaitAsync(TimeoutMax);

    /// <summary>The task's exception, or null where it ended well.</summary>
    public static async Task<Exception?> FaultAsync(this Task task)
    {
        try
        {
            await task.Soon();
            return null;
        }
        catch (Exception e)
        {
            return e;
        }
    }
}
