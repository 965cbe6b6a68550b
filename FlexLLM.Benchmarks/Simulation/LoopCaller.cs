using FlexLLM.Backends.Null;
using FlexLLM.Engine;
using FlexLLM.Execution;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// Calls an <see cref="EngineLoop"/> through its inbox as callers on other threads do. The clock stands still meanwhile, so that a full
/// inbox, at which they would wait, is a fault here.
/// </summary>
internal sealed class LoopCaller(EngineInbox inbox, ManualClock clock)
{
    /// <summary>Has the loop do something before its next step.</summary>
    public Task<T> Call<T>(Func<EngineLoop, T> action, bool isRequest = false)
    {
        var submission = new Submission<T>(action, isRequest);
        Check.That(inbox.SubmitAsync(submission, CancellationToken.None).AsTask().IsCompletedSuccessfully, "the inbox is full");
        return submission.Result;
    }

    /// <summary>Sends a request whose answer has exactly so many tokens.</summary>
    /// <param name="prompt">Token ids.</param>
    /// <param name="answerTokens">Tokens of the answer.</param>
    /// <param name="waited">How long ago it arrived.</param>
    /// <param name="onTaken">Receives it when the loop takes it in.</param>
    /// <param name="slo">Its targets, or null for the engine's.</param>
    public Task<InferenceSequence> Submit(
        int[] prompt, int answerTokens, TimeSpan waited, Action<InferenceSequence>? onTaken = null, ServiceLevelObjective? slo = null)
    {
        var request = new GenerationRequest(prompt)
        {
            MaxTokens = answerTokens,
            Sampling = SamplingOptions.Greedy,
            IgnoreEos = true,
            Slo = slo,
        };
        var prepared = new PreparedRequest(
            prompt, request.Sampling.Resolve(new SamplingDefaults(), 0), StopSequences.None, clock.GetTimestamp() - waited.Ticks,
            () => { });
        return Call(
            loop =>
            {
                InferenceSequence sequence = loop.Submit(request, prepared);
                onTaken?.Invoke(sequence);
                return sequence;
            },
            isRequest: true);
    }
}
