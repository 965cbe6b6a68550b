using BenchmarkDotNet.Configs;
using BenchmarkDotNet.Jobs;
using BenchmarkDotNet.Running;
using BenchmarkDotNet.Toolchains.InProcess.Emit;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `kernels`: micro-benchmarks of the backend's operations and of the sampler, on the widths of qwen2.5-0.5b, and of the compiler.
/// Arguments go to BenchmarkDotNet (--filter, --list).
/// </summary>
internal static class KernelBenchmarks
{
    public const string Usage = "[--filter '*Linear*'] [other options of BenchmarkDotNet]";

    /// <summary>Runs what the arguments choose; everything without a filter.</summary>
    public static int Run(string[] args)
    {
        // In this process: a generated project would inherit the rules of this repository and not pass them.
        IConfig config = DefaultConfig.Instance.AddJob(Job.ShortRun.WithToolchain(InProcessEmitToolchain.Instance));
        string[] chosen = args.Contains("--filter") || args.Contains("--list") ? args : [.. args, "--filter", "*"];
        Type[] types =
            [typeof(WeightKernels), typeof(RowKernels), typeof(SamplerKernels), typeof(CompilerBenchmarks), typeof(SchedulerBenchmarks)];
        return BenchmarkSwitcher.FromTypes(types).Run(chosen, config).Any(summary => summary.HasCriticalValidationErrors) ? 2 : 0;
    }
}
