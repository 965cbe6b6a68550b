using BenchmarkDotNet.Attributes;
using BenchmarkDotNet.Columns;
using BenchmarkDotNet.Configs;
using BenchmarkDotNet.Jobs;
using BenchmarkDotNet.Reports;
using BenchmarkDotNet.Running;
using BenchmarkDotNet.Toolchains.InProcess.NoEmit;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>
/// The verb <c>kernels</c>: operations of the CPU backend at the shapes of Qwen2.5-0.5B (hidden 896, 14 query and 2 KV heads of
/// 64, intermediate 4864), on as many threads as there are processors.
/// </summary>
public class KernelBenchmarks : IDisposable
{
    private const int Hidden = 896;
    private const int Intermediate = 4864;
    private const int HeadDim = 64;
    private const int KvColumns = 2 * HeadDim;
    private const int Context = 1024;

    private CpuBackend _backend = null!;
    private DeviceWeight _gate = null!;
    private DeviceLora _lora = null!;
    private DeviceKvCache _cache = null!;
    private DeviceTensor _gain = null!;
    private DeviceTensor _x = null!;
    private DeviceTensor _y = null!;
    private DeviceTensor _wide = null!;
    private DeviceTensor _wideToo = null!;
    private DeviceTensor _gradA = null!;
    private DeviceTensor _gradB = null!;
    private DeviceTensor _dK = null!;
    private DeviceTensor _dV = null!;
    private DeviceTensor _logSumExp = null!;
    private int[] _blockTable = [];

    /// <summary>Rows of the batch: decode alone, a full decode batch, a finetuning window, a prefill chunk.</summary>
    [Params(1, 16, 128, 512)]
    public int Rows { get; set; }

    /// <summary>Runs the benchmarks; arguments go to BenchmarkDotNet, for example <c>--filter *Linear*</c>.</summary>
    public static int Run(string[] args)
    {
        IConfig config = ManualConfig.Create(DefaultConfig.Instance)
            .AddJob(Job.ShortRun.WithToolchain(InProcessNoEmitToolchain.Instance))
            .AddColumn(new RateColumn())
            .WithOptions(ConfigOptions.JoinSummary | ConfigOptions.DisableLogFile);
        IEnumerable<Summary> summaries = BenchmarkSwitcher.FromTypes([typeof(KernelBenchmarks)]).Run(
            args.Length == 0 ? ["--filter", "*"] : args, config);
        return summaries.Any(summary => summary.HasCriticalValidationErrors) ? 1 : 0;
    }

    [GlobalSetup]
    public unsafe void Setup()
    {
        _backend = new CpuBackend(Environment.ProcessorCount);
        fixed (float* w = Numbers(Intermediate * Hidden))
        {
            _gate = _backend.CreateWeight(new HostMatrix((byte*)w, DType.F32, Intermediate, Hidden), DType.BF16);
        }

        _lora = _backend.CreateLora(Intermediate, Hidden, 16);
        _cache = _backend.CreateKvCache(1, Context / DeviceKvCache.TokensPerBlock, KvColumns / HeadDim, HeadDim);
        _blockTable = [.. Enumerable.Range(0, _cache.Blocks)];
        _gain = Tensor(1, Hidden);
        _x = Tensor(Rows, Hidden);
        _y = Tensor(Rows, Hidden);
        _wide = Tensor(Rows, Intermediate);
        _wideToo = Tensor(Rows, Intermediate);
        _gradA = Tensor(16, Intermediate);
        _gradB = Tensor(16, Hidden);
        _dK = Tensor(Context, KvColumns);
        _dV = Tensor(Context, KvColumns);
        _logSumExp = Tensor(Context, Hidden / HeadDim);
        _backend.AppendKv(_dK, _dV, 0, [new AttentionSegment(0, Context, 0, _cache, _blockTable)]);
        _backend.Attention(_x, _y, 0, [Window]);
    }

    [GlobalCleanup]
    public void Dispose()
    {
        IDisposable?[] all =
            [_gate, _lora, _cache, _gain, _x, _y, _wide, _wideToo, _gradA, _gradB, _dK, _dV, _logSumExp, _backend];
        foreach (IDisposable? one in all)
        {
            one?.Dispose();
        }

        GC.SuppressFinalize(this);
    }

    [Benchmark]
    public void Linear() => _backend.Linear(_x, _gate, null, _wide, accumulate: false);

    [Benchmark]
    public void LinearBackwardInput() => _backend.LinearBackwardInput(_wide, _gate, _y, accumulate: false);

    [Benchmark]
    public void LoraBypass() => _backend.LoraBypass(_wide, [new LoraSegment(0, Rows, _lora, 2f)], _y);

    [Benchmark]
    public void LoraBypassBackward() => _backend.LoraBypassBackward(_wide, _x, _lora, 2f, _gradA, _gradB, _wideToo);

    [Benchmark]
    public void Attention() => _backend.Attention(_x, _y, 0, [Window]);

    [Benchmark]
    public void AttentionBackward() => _backend.AttentionBackward(_x, _x, 0, Window, _y, _dK, _dV);

    [Benchmark]
    public void RmsNorm() => _backend.RmsNorm(_x, _gain, 1e-6f, _y);

    [Benchmark]
    public void SiluGate() => _backend.SiluGate(_wide, _wide, _wideToo);

    // The last rows of the context.
    private AttentionSegment Window => new(0, Rows, Context - Rows, _cache, _blockTable, _logSumExp);

    private DeviceTensor Tensor(int rows, int columns)
    {
        DeviceTensor tensor = _backend.Allocate(rows, columns);
        _backend.Upload(Numbers(rows * columns), tensor);
        return tensor;
    }

    private static float[] Numbers(int count)
    {
        SeededRandom random = new(1);
        float[] numbers = new float[count];
        for (int i = 0; i < count; i++)
        {
            numbers[i] = (random.NextSingle() - 0.5f) / 8;
        }

        return numbers;
    }

    /// <summary>Billions of multiplications and additions a second, for the operations that are products.</summary>
    private sealed class RateColumn : IColumn
    {
        public string Id => nameof(RateColumn);

        public string ColumnName => "GFLOP/s";

        public bool AlwaysShow => true;

        public ColumnCategory Category => ColumnCategory.Custom;

        public int PriorityInCategory => 0;

        public bool IsNumeric => true;

        public UnitType UnitType => UnitType.Dimensionless;

        public string Legend => "Billions of multiplications and additions a second";

        public bool IsAvailable(Summary summary) => true;

        public bool IsDefault(Summary summary, BenchmarkCase benchmarkCase) => false;

        public string GetValue(Summary summary, BenchmarkCase benchmarkCase, SummaryStyle style) =>
            GetValue(summary, benchmarkCase);

        public string GetValue(Summary summary, BenchmarkCase benchmarkCase)
        {
            double rows = (int)benchmarkCase.Parameters[nameof(Rows)];
            double scores = rows * (Context - ((rows - 1) / 2)) * Hidden;
            double? flops = benchmarkCase.Descriptor.WorkloadMethod.Name switch
            {
                nameof(Linear) or nameof(LinearBackwardInput) => 2 * rows * Hidden * Intermediate,
                nameof(LoraBypass) => 2 * rows * 16 * (Hidden + Intermediate),
                nameof(LoraBypassBackward) => 2 * rows * 16 * ((2 * Hidden) + (3 * Intermediate)),
                nameof(Attention) => 4 * scores,
                nameof(AttentionBackward) => 10 * scores,
                _ => null,
            };
            double? nanoseconds = summary[benchmarkCase]?.ResultStatistics?.Median;
            return flops is null || nanoseconds is null ? "-" : $"{flops / nanoseconds:F1}";
        }
    }
}
