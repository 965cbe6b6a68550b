namespace FlexLLM.Tests.Support;

/// <summary>
/// Stops the loop thread at the n-th call of one operation, so that a test can send messages while a step is surely in
/// progress; they take effect right after it.
/// </summary>
internal sealed class StepGate(string operation, int count) : IDisposable
{
    private readonly ManualResetEventSlim _open = new(false);
    private TaskCompletionSource _reached = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private volatile bool _armed;
    private int _left;

    public ComputeDevice Device(int threads = 1) => new ProbedDevice(Probe, threads);

    /// <summary>A group whose first rank stops; the others and the loop wait for it.</summary>
    public ComputeDevice Group(int ranks) => RankDevice.Group(ranks, (rank, name) =>
    {
        if (rank == 0)
        {
            Probe(name);
        }
    });

    /// <summary>
    /// Calls count from now on: what loading an engine computes must not. Armed again, it stops the thread once more; the one
    /// that it stopped must have gone on, and nothing may be in progress that calls the operation.
    /// </summary>
    public void Arm()
    {
        _armed = false;
        _open.Reset();
        _reached = new TaskCompletionSource(TaskCreationOptions.RunContinuationsAsynchronously);
        _left = count;
        _armed = true;
    }

    /// <summary>Ends when the loop thread stands at the gate.</summary>
    public Task ReachedAsync() => _reached.Task.Soon();

    public void Open() => _open.Set();

    public void Dispose() => _open.Set();

    private void Probe(string name)
    {
        if (_armed && name == operation && --_left == 0)
        {
            _reached.TrySetResult();
            _open.Wait(Waiting.TimeoutMax);
        }
    }
}
