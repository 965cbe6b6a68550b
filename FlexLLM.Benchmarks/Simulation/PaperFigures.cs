namespace FlexLLM.Benchmarks.Simulation;

/// <summary>
/// What the authors measured on one model, at 1 to 5 requests a second on one pipeline, or 4 to 20 on four. Sections are those of
/// our digest of the paper.
/// </summary>
internal sealed record PaperFigures
{
    /// <summary>Arrivals a second on one pipeline.</summary>
    public static IReadOnlyList<double> PipelineRates { get; } = [1, 2, 3, 4, 5];

    /// <summary>Pipelines of the evaluation; the authors measured one and multiplied (g.1).</summary>
    public const int Pipelines = 4;

    public required string Model { get; init; }

    /// <summary>Their released scheduler: mean TPOT in ms, one pipeline (g.5); NaN where the notebook shows none.</summary>
    public required double[] TpotMs { get; init; }

    /// <summary>Generated tokens a second, one pipeline (g.5).</summary>
    public required double[] Generated { get; init; }

    /// <summary>Finetuning tokens a second, one pipeline (g.5).</summary>
    public required double[] Trained { get; init; }

    /// <summary>One whole sample an iteration: ms of an iteration, and finetuning tokens a second (g.7, frequency 1).</summary>
    public required (double Ms, double Trained) WholeSample { get; init; }

    /// <summary>Generated tokens a second of one saturated replica of vLLM, middle of the range (g.6).</summary>
    public required double ServerSaturated { get; init; }

    /// <summary>vLLM's TPOT in ms at 2, 4, 6, 8 and 10 requests a second on one replica (g.6); empty where it is not reported.</summary>
    public double[] ServerTpotMs { get; init; } = [];

    /// <summary>Attainment in % on four pipelines, by mode (g.6, g.7); NaN where it is not reported.</summary>
    public required (string Mode, double[] Percent)[] Attainment { get; init; }

    /// <summary>Finetuning tokens a second on four pipelines, by mode (g.6, g.7).</summary>
    public required (string Mode, double[] Rate)[] Finetuning { get; init; }

    /// <summary>Generated tokens a second at 20 requests a second on four pipelines, by mode (g.6).</summary>
    public required (string Mode, double Rate)[] GeneratedAtPeak { get; init; }

    public static IReadOnlyList<PaperFigures> All { get; } =
    [
        new()
        {
            Model = "8b",
            TpotMs = [32.6, 33.6, 34.9, 36.1, 36.7],
            Generated = [260, 514, 751, 1059, 1307],
            Trained = [2352, 2229, 2093, 1938, 1799],
            WholeSample = (640, 5650),
            ServerSaturated = 2920,
            ServerTpotMs = [13.0, 15.5, 18.3, 21.9, 29.8],
            Attainment =
            [
                ("co-serving", [99, 99, 98.7, 98.3, 97.6]), ("temporal-64", AtPeak(98)), ("temporal-128", AtPeak(98)),
                ("temporal-512", AtPeak(99)), ("temporal-dynamic", AtPeak(99)), ("spatial", AtPeak(92.2)),
                ("split-1/4", [99, 99, 21, 19.5, 20]), ("split-2/4", AtPeak(91)), ("split-3/4", [100, 100, 100, 100, 100]),
            ],
            Finetuning =
            [
                ("co-serving", [9408, 8915, 8373, 7751, 7195]), ("temporal-64", [9829, 9396, 8895, 8462, 8006]),
                ("temporal-128", [6350, 5790, 5550, 5210, 4720]), ("temporal-512", [2034, 1784, 1692, 1464, 1373]),
                ("temporal-dynamic", [7700, 7330, 6900, 6450, 5990]), ("spatial", [8439, 8165, 7709, 7140, 6752]),
                ("split-1/4", Always(11_430)), ("split-2/4", Always(7570)), ("split-3/4", Always(3811)),
            ],
            GeneratedAtPeak = [("co-serving", 5229), ("split-1/4", 3002), ("split-2/4", 5250), ("split-3/4", 5434)],
        },
        new()
        {
            Model = "14b",
            TpotMs = [57.9, 60.9, 64.3, 66.2, 66.5],
            Generated = [258, 504, 604, 888, 1179],
            Trained = [941, 857, 813, 701, 555],
            WholeSample = (841, 4370),
            ServerSaturated = 2420,
            Attainment =
            [
                ("co-serving", [100, 99.6, 99.4, 98.6, 96.6]), ("temporal-64", AtPeak(24.4)), ("temporal-128", AtPeak(91.5)),
                ("temporal-512", AtPeak(97)), ("temporal-dynamic", AtPeak(95)), ("spatial", AtPeak(84.2)),
                ("split-1/4", [100, 88, 15, 16, 17]), ("split-2/4", [double.NaN, double.NaN, double.NaN, 88, 16]),
                ("split-3/4", [100, 100, 100, 100, 100]),
            ],
            Finetuning =
            [
                ("co-serving", [3765, 3428, 3250, 2803, 2219]), ("temporal-64", [3941, 3739, 3648, 3483, 3474]),
                ("temporal-128", [2150, 2005, 1937, 1855, 1845]), ("temporal-512", [500, 483, 447, 447, 456]),
                ("temporal-dynamic", [2810, 2640, 2555, 2395, 2070]), ("spatial", [3538, 3209, 3063, 2779, 2569]),
                ("split-1/4", Always(3143)), ("split-2/4", Always(2080)), ("split-3/4", Always(1045)),
            ],
            GeneratedAtPeak = [("co-serving", 5100), ("split-1/4", 2461), ("split-2/4", 4721), ("split-3/4", 5408)],
        },
        new()
        {
            Model = "32b",
            TpotMs = [53.8, double.NaN, double.NaN, double.NaN, 59.8],
            Generated = [263, 514, 636, 951, 1267],
            Trained = [803, 760, 734, 656, 559],
            WholeSample = (848, 4330),
            ServerSaturated = 2395,
            Attainment =
            [
                ("co-serving", [99, 99, 99, 99, 89]), ("temporal-64", AtPeak(23.3)), ("temporal-128", AtPeak(93.5)),
                ("temporal-512", AtPeak(95)), ("temporal-dynamic", AtPeak(2)), ("spatial", AtPeak(68.2)),
                ("split-1/4", [100, 82, 14.5, 15, 16]), ("split-2/4", [double.NaN, double.NaN, double.NaN, 82, 15.5]),
                ("split-3/4", [100, 100, 100, 100, 100]),
            ],
            Finetuning =
            [
                ("co-serving", [3211, 3039, 2936, 2623, 2236]), ("temporal-64", [3724, 3680, 3742, 3538, 3484]),
                ("temporal-128", [2015, 1985, 1965, 1980, 1925]), ("temporal-512", [480, 471, 453, 453, 471]),
                ("temporal-dynamic", [2710, 2690, 2600, 2545, 1300]), ("spatial", [3049, 2853, 2720, 2542, 2338]),
                ("split-1/4", Always(1408)), ("split-2/4", Always(928)), ("split-3/4", Always(472)),
            ],
            GeneratedAtPeak = [("co-serving", 5210), ("split-1/4", 2421), ("split-2/4", 4705), ("split-3/4", 5351)],
        },
    ];

    /// <summary>70B, four GPUs, 8 decoding requests: forward tokens and ms of an iteration (e.4).</summary>
    public static IReadOnlyList<(int Tokens, double Ms)> ForwardProfile { get; } =
        [(0, 46.7), (8, 58.0), (24, 58.4), (56, 65.9), (120, 87.2), (248, 118), (504, 201.6)];

    /// <summary>The same with layers of a sample of 1,024 tokens backward (e.4).</summary>
    public static IReadOnlyList<(int Layers, double Ms)> BackwardProfile { get; } =
        [(1, 58.0), (2, 63.1), (4, 73.5), (8, 94.5), (16, 139), (32, 220), (64, 387)];

    public static PaperFigures Of(string model) => All.First(f => f.Model == model);

    private static double[] Always(double value) => [value, value, value, value, value];

    private static double[] AtPeak(double value) => [double.NaN, double.NaN, double.NaN, double.NaN, value];
}
