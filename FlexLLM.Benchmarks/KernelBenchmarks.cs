using System.Diagnostics;
using System.Reflection;
using BenchmarkDotNet.Configs;
using BenchmarkDotNet.Jobs;
using BenchmarkDotNet.Running;
using BenchmarkDotNet.Toolchains.InProcess.Emit;

namespace FlexLLM.Benchmarks;

/// <summary>
/// `kernels`: micro-benchmarks of the backend's operations and of the sampler, on the widths of qwen2.5-0.5b, of the compiler and of the
/// scheduler. Arguments go to BenchmarkDotNet (--filter, --list).
/// </summary>
internal static class KernelBenchmarks
{
    public const string Usage = "[--filter '*Linear*'] [other options of BenchmarkDotNet]";

    /// <summary>Runs what the arguments choose; everything without a filter.</summary>
    public static int Run(string[] args)
    {
        foreach (Assembly assembly in new[] { typeof(KernelBenchmarks).Assembly, typeof(CoServingEngine).Assembly })
        {
            if (assembly.GetCustomAttribute<DebuggableAttribute>() is { IsJITOptimizerDisabled: true })
            {
                throw new FlexLlmException($"{assembly.GetName().Name} was built without optimization; use -c Release.");
            }
        }

        // In this process: a generated project would inherit the rules of this repository and not pass them. BenchmarkDotNet's own check
        // for optimized code loads every referenced assembly, of which TorchSharp may be missing.
        IConfig config = DefaultConfig.Instance.AddJob(Job.ShortRun.WithToolchain(InProcessEmitToolchain.Instance))
            .WithOptions(ConfigOptions.DisableOptimizationsValidator);
        string[] chosen = args.Contains("--filter") || args.Contains("--list") ? args : [.. args, "--filter", "*"];
        Type[] types =
        [
            typeof(WeightKernels), typeof(RowKernels), typeof(SamplerKernels), typeof(CompilerBenchmarks), typeof(SchedulerBenchmarks),
            typeof(SnapshotBenchmarks),
        ];
        return BenchmarkSwitcher.FromTypes(types).Run(chosen, config).Any(summary => summary.HasCriticalValidationErrors) ? 2 : 0;
    }
}
