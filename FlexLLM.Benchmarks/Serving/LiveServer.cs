namespace FlexLLM.Benchmarks.Serving;

/// <summary>Counters of all engines of a mode together, since they were loaded.</summary>
internal readonly record struct LiveCounters(
    long Trained, long Steps, long FinetuningSteps, long StepsOverBudget, long Preemptions, double BusySeconds)
{
    public static LiveCounters operator +(LiveCounters a, LiveCounters b) => new(
        a.Trained + b.Trained, a.Steps + b.Steps, a.FinetuningSteps + b.FinetuningSteps, a.StepsOverBudget + b.StepsOverBudget,
        a.Preemptions + b.Preemptions, a.BusySeconds + b.BusySeconds);

    public static LiveCounters operator -(LiveCounters a, LiveCounters b) => new(
        a.Trained - b.Trained, a.Steps - b.Steps, a.FinetuningSteps - b.FinetuningSteps, a.StepsOverBudget - b.StepsOverBudget,
        a.Preemptions - b.Preemptions, a.BusySeconds - b.BusySeconds);
}

/// <summary>The engine or the two engines of a mode, with a finetuning job that outlasts every run.</summary>
internal sealed class LiveServer : IAsyncDisposable
{
    // A trainer that serves nobody may take long steps: nothing can arrive that would have to wait. But its counters, which are
    // read between steps, should not lag behind the window by much.
    public static readonly TimeSpan TrainerStepMax = TimeSpan.FromMilliseconds(500);
    private const int Epochs = 10_000;
    private readonly List<CoServingEngine> _engines = [];
    private FinetuningJob? _job;

    private LiveServer()
    {
    }

    /// <summary>The engine that takes requests; null where a mode serves nobody.</summary>
    public CoServingEngine? Serving { get; private set; }

    /// <summary>Loads the engines of a mode and starts its job.</summary>
    public static async Task<LiveServer> StartAsync(ServeSettings settings, ServingMode mode, ServiceLevelObjective slo)
    {
        var server = new LiveServer();
        try
        {
            (int serving, int training) = mode.Layout == ServingLayout.Split
                ? (settings.ServingThreads, settings.TrainingThreads)
                : (settings.Threads, settings.Threads);
            CoServingEngine? trainer = null;
            if (mode.Serves)
            {
                server.Serving = await server.LoadAsync(settings, ServerOptions(settings, serving, mode.Policy, slo)).ConfigureAwait(false);
                trainer = mode.Layout == ServingLayout.Shared ? server.Serving : null;
            }

            if (mode.Trains)
            {
                trainer ??= await server.LoadAsync(settings, TrainerOptions(settings, training)).ConfigureAwait(false);
                server._job = await trainer.StartFinetuningAsync(JobOf(settings, trainer)).ConfigureAwait(false);
            }

            return server;
        }
        catch
        {
            await server.DisposeAsync().ConfigureAwait(false);
            throw;
        }
    }

    /// <summary>Answers a few requests and trains a few tokens, so that code is compiled and caches are warm.</summary>
    public async Task WarmUpAsync(ServeSettings settings)
    {
        if (Serving is not null)
        {
            var replay = new TraceReplay(Serving, settings.Seed + 1);
            var arrival = new TraceArrival(0, Math.Min(64, settings.Lengths.MaxPrompt), Math.Min(8, settings.Lengths.MaxAnswer));
            await Task.WhenAll(Enumerable.Range(0, Math.Min(4, settings.Sequences)).Select(_ => replay.SendAsync(arrival, 0, default)))
                .ConfigureAwait(false);
        }

        // A mode may well train nothing for seconds: it is not waited for any longer than this.
        for (int i = 0; i < 40 && _job is not null && (await ReadAsync().ConfigureAwait(false)).Trained == 0; i++)
        {
            await Task.Delay(50).ConfigureAwait(false);
        }
    }

    /// <summary>What has been done so far.</summary>
    /// <exception cref="EngineFaultedException">An engine stopped, or the job ended.</exception>
    public async Task<LiveCounters> ReadAsync()
    {
        if (_job is { Latest.Status: not FinetuningStatus.Running })
        {
            throw new EngineFaultedException($"The finetuning job ended early: {_job.Latest.Status}.", _job.Completion.Exception);
        }

        var sum = new LiveCounters();
        foreach (CoServingEngine engine in _engines)
        {
            EngineStatistics s = await engine.GetStatisticsAsync().ConfigureAwait(false);
            sum += new LiveCounters(
                s.TokensTrained, s.Steps, s.FinetuningSteps, s.StepsOverBudget, s.Preemptions, s.TimeInSteps.TotalSeconds);
        }

        return sum;
    }

    public async ValueTask DisposeAsync()
    {
        foreach (CoServingEngine engine in _engines)
        {
            await engine.DisposeAsync().ConfigureAwait(false);
        }
    }

    private static CoServingOptions ServerOptions(
        ServeSettings settings, int threads, SharingPolicy policy, ServiceLevelObjective slo)
    {
        return new CoServingOptions
        {
            Slo = slo,
            Sharing = policy,
            Device = settings.Open(threads),
            DeviceBytesMax = settings.DeviceBytes,
            WeightType = settings.Weights,
            ContextTokensMax = settings.ContextTokens,
            KvCacheTokens = settings.KvTokens,
            TokensPerStepMax = settings.ServerStepTokens,
            SequencesMax = settings.Sequences,
            Seed = settings.Seed,
        };
    }

    private static CoServingOptions TrainerOptions(ServeSettings settings, int threads) => new()
    {
        Device = settings.Open(threads),
        DeviceBytesMax = settings.DeviceBytes,
        WeightType = settings.Weights,
        ContextTokensMax = settings.SampleTokens,
        TokensPerStepMax = settings.TrainerStepTokens,
        SequencesMax = 1,
        IdleStepMax = TrainerStepMax,
        Seed = settings.Seed,
    };

    private static FinetuningRequest JobOf(ServeSettings settings, CoServingEngine engine) => new()
    {
        Adapter = "trained",
        Dataset = FinetuningData.Load(settings.Data, engine.Tokenizer, engine.Config, settings.SampleTokens, settings.Seed),
        Method = settings.Lora,
        Epochs = Epochs,
        GradientAccumulation = settings.Accumulation,
        SampleTokensMax = settings.SampleTokens,
        InitializationSeed = settings.Seed,
    };

    private async Task<CoServingEngine> LoadAsync(ServeSettings settings, CoServingOptions options)
    {
        CoServingEngine engine = await settings.Model.StartAsync(settings.Random, options).ConfigureAwait(false);
        _engines.Add(engine);
        return engine;
    }
}
