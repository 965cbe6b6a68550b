using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.KvCache;
using FlexLLM.Scheduling;
using Microsoft.Extensions.Logging;

namespace FlexLLM.Engine;

/// <summary>Latency targets at the door: whether the machine could keep them for one request alone.</summary>
internal sealed partial class EngineLoop
{
    // As it was at load. Null without a measurement: there is nothing to hold against anybody.
    private LatencyModel? _measured;

    /// <summary>Takes what <see cref="Calibrate"/> measured as the least that work can cost, and checks the engine's targets.</summary>
    /// <exception cref="RequestRejectedException">A target is below it, and options say to refuse.</exception>
    public void CheckTargets()
    {
        _measured = Latency == LatencyModel.Default ? null : Latency;
        Accept(FaultOf(_options.Slo, promptTokens: 1, cached: 0), nameof(CoServingOptions.Slo));
        Accept(FaultOf(_options.BatchSlo, promptTokens: 1, cached: 0), nameof(CoServingOptions.BatchSlo));
    }

    // With the engine's own targets only a long prompt can be at fault; a warning for each such request would tell nobody anything new.
    private void CheckTargets(GenerationRequest request, int[] prompt, AdapterVersion? adapter)
    {
        if (request.Slo is null && _options.UnattainableSlo == UnattainableSlo.Warn)
        {
            return;
        }

        ServiceLevelObjective slo = request.Slo ?? _options.SloOf(request.Class);
        string? fault = FaultOf(slo, prompt.Length, cached: 0);
        if (fault is not null && _pool.Prefixes is PrefixCache prefixes)
        {
            var path = new PrefixPath(adapter);
            prefixes.Match(path, prompt);
            fault = FaultOf(slo, prompt.Length, path.Count * DeviceKvCache.TokensPerBlock);
        }

        Accept(fault, request.Slo is null ? "The engine's targets for this request" : "The request's Slo");
    }

    private void Accept(string? fault, string name)
    {
        if (fault is not null && _options.UnattainableSlo == UnattainableSlo.Refuse)
        {
            throw new RequestRejectedException($"{name}: {fault}");
        }

        if (fault is not null)
        {
            _logger.LogWarning("{Name}: {Fault}", name, fault);
        }
    }

    private string? FaultOf(ServiceLevelObjective slo, int promptTokens, int cached)
    {
        if (_measured is not LatencyModel measured)
        {
            return null;
        }

        TimeSpan promptMin = TimeSpan.Zero;
        int most = Math.Min(Limits.TokensPerStepMax, Limits.PrefillChunkMax);
        for (int start = cached; start < promptTokens; start += most)
        {
            int tokens = Math.Min(most, promptTokens - start);
            bool ends = start + tokens == promptTokens;
            promptMin += measured.Expect(default(StepFeatures).WithInference(start, tokens, sampled: ends ? 1 : 0));
        }

        TimeSpan tokenMin = measured.Expect(default(StepFeatures).WithInference(0, 1, sampled: 1));
        return slo.FaultAgainst(tokenMin, promptTokens - cached, promptMin);
    }
}
