using System.Runtime.CompilerServices;
using System.Text;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Engine;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Scheduling;
using Microsoft.Extensions.Logging;

namespace FlexLLM;

/// <summary>
/// Serves a model and finetunes adapters on the same weights at the same time, in the caller's process. All members may be
/// called from any thread. Dispose it to free the device: requests in flight then end with <see cref="ObjectDisposedException"/>,
/// jobs as cancelled.
/// </summary>
public sealed class CoServingEngine : IAsyncDisposable
{
    private const int ContextTokensDefault = 4096;

    private readonly CoServingOptions _options;
    private readonly GuardedLogger _logger;
    private readonly IComputeBackend _backend;
    private readonly LoadedModel _model;
    private readonly EngineInbox _inbox;
    private readonly EngineLoop _loop;
    private readonly LatencyProfileFile? _profile;
    private readonly SamplingDefaults _samplingDefaults;
    private readonly SemaphoreSlim _places;
    private readonly TaskCompletionSource _ended = new(TaskCreationOptions.RunContinuationsAsynchronously);
    private readonly CancellationTokenSource _closing = new();
    private volatile bool _stopping;
    private volatile Exception? _ending;
    private volatile Exception? _fault;
    private int _disposed;

    private CoServingEngine(
        string folder, CoServingOptions options, IComputeBackend backend, LoadedModel model, CheckpointFiles files, int kvBlocks)
    {
        ModelFolder = folder;
        _options = options;
        _logger = new GuardedLogger(options.Logger);
        _backend = backend;
        _model = model;
        Config = model.Whole;
        Tokenizer = files.Tokenizer;
        ChatTemplate = files.ChatTemplate;
        _samplingDefaults = files.SamplingDefaults;
        _inbox = new EngineInbox(options.InboxCapacity);
        _places = new SemaphoreSlim(options.RequestsMax, options.RequestsMax);
        _loop = new EngineLoop(model, Tokenizer, options, _inbox, files.EosTokens, kvBlocks);
        _profile = options.LatencyProfileFolder is string profiles
            ? new LatencyProfileFile(profiles, LatencyProfileFile.KeyOf(model, options), _logger)
            : null;
        Adapters = new AdapterManager(this);
    }

    /// <summary>Shape of the model.</summary>
    public ModelConfig Config { get; }

    /// <summary>The checkpoint's tokenizer, or null where it has none: prompts and examples must then be token ids.</summary>
    public Tokenizer? Tokenizer { get; }

    /// <summary>The checkpoint's chat template, or null where it has none that this library knows.</summary>
    public ChatTemplate? ChatTemplate { get; }

    /// <summary>Adapters that requests can name.</summary>
    public AdapterManager Adapters { get; }

    /// <summary>Longest sequence, prompt and answer, in tokens.</summary>
    public int ContextTokensMax => _model.PositionsMax;

    internal string ModelFolder { get; }

    internal IComputeBackend Backend => _backend;

    /// <summary>Loads a checkpoint in HuggingFace format and starts the engine.</summary>
    /// <param name="folder">Folder with config.json, safetensors weights and, for text, tokenizer.json.</param>
    /// <param name="options">Limits and targets, or null for the defaults.</param>
    /// <param name="cancellationToken">Gives up loading.</param>
    /// <exception cref="InvalidFileException">A file is missing or malformed; the error names file, field and fault.</exception>
    /// <exception cref="ArgumentException">An option is out of its range.</exception>
    /// <exception cref="RequestRejectedException">
    /// Weights, workspace and the smallest KV cache would not fit into <see cref="CoServingOptions.DeviceBytesMax"/>, or a latency
    /// target cannot be met and <see cref="CoServingOptions.UnattainableSlo"/> says to refuse.
    /// </exception>
    public static async Task<CoServingEngine> LoadAsync(
        string folder, CoServingOptions? options = null, CancellationToken cancellationToken = default)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        options ??= new CoServingOptions();
        options.Validate();
        CoServingEngine engine = await Task.Run(() => Load(folder, options, cancellationToken), cancellationToken).ConfigureAwait(false);
        engine.StartThread();
        return engine;
    }

    /// <summary>Starts an engine on random weights; it has no tokenizer.</summary>
    /// <param name="weights">Shape and weights; they must live until the engine is there.</param>
    /// <param name="options">Limits and targets; the type of the weights is theirs.</param>
    internal static async Task<CoServingEngine> LoadRandomAsync(RandomWeights weights, CoServingOptions options)
    {
        options.Validate();
        CoServingEngine engine = await Task.Run(() => Build(
            ("random", weights.Config, CheckpointFiles.None(weights.Config)), options, _ => weights.Type,
            (backend, positions, shard, compiler) =>
                LoadedModel.CreateRandom(weights, backend, positions, shard, compiler))).ConfigureAwait(false);
        engine.StartThread();
        return engine;
    }

    /// <summary>Streams an answer. Leaving the loop or cancelling ends the request within a step.</summary>
    /// <exception cref="RequestRejectedException">
    /// The request cannot be served: too long, unknown adapter, no tokenizer.
    /// </exception>
    /// <exception cref="ArgumentException">A parameter is out of its range.</exception>
    /// <exception cref="EngineFaultedException">The engine stopped with an error.</exception>
    /// <exception cref="ObjectDisposedException">The engine was disposed.</exception>
    public async IAsyncEnumerable<GeneratedToken> GenerateAsync(
        GenerationRequest request, [EnumeratorCancellation] CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(request);
        long arrived = _options.Clock.GetTimestamp();
        int[] prompt = Encode(request);
        Validate(request, prompt);
        var prepared = new PreparedRequest(
            prompt, request.Sampling.Resolve(_samplingDefaults, engineSeed: 0), new StopSequences(request.StopSequences), arrived,
            () => _places.Release());
        await EnterAsync(cancellationToken).ConfigureAwait(false);
        InferenceSequence? sequence = null;
        try
        {
            sequence = await _inbox.CallAsync(loop => loop.Submit(request, prepared), cancellationToken, isRequest: true)
                .ConfigureAwait(false);
            await foreach (GeneratedToken token in sequence.Stream.ReadAllAsync(cancellationToken).ConfigureAwait(false))
            {
                yield return token;
            }
        }
        finally
        {
            if (sequence is null)
            {
                _places.Release();
            }
            else
            {
                sequence.RequestCancel();
                WakeLoop();
                sequence.End();
            }
        }
    }

    /// <summary>Generates a whole answer.</summary>
    /// <inheritdoc cref="GenerateAsync" path="/exception"/>
    public async Task<GenerationResult> CompleteAsync(GenerationRequest request, CancellationToken cancellationToken = default)
    {
        var tokens = new List<int>();
        var text = new StringBuilder();
        GeneratedToken? last = null;
        long begun = _options.Clock.GetTimestamp();
        TimeSpan? first = null;
        await foreach (GeneratedToken token in GenerateAsync(request, cancellationToken).ConfigureAwait(false))
        {
            first ??= _options.Clock.GetElapsedTime(begun);
            last = token;
            text.Append(token.Text);
            if (token.TokenId >= 0)
            {
                tokens.Add(token.TokenId);
            }
        }

        return new GenerationResult
        {
            Tokens = tokens,
            Text = text.ToString(),
            FinishReason = last?.FinishReason ?? throw new EngineFaultedException("The answer's stream ended without a reason.", null),
            FinishDetail = last.FinishDetail,
            TimeToFirstToken = first!.Value,
            Duration = _options.Clock.GetElapsedTime(begun),
        };
    }

    /// <summary>Tokenises the dataset and starts a job, which takes the time that requests leave.</summary>
    /// <exception cref="RequestRejectedException">
    /// The job does not fit the model or the device, or nothing is left to train on.
    /// </exception>
    /// <exception cref="InvalidFileException">A malformed dataset line or checkpoint.</exception>
    public async Task<FinetuningJob> StartFinetuningAsync(FinetuningRequest request, CancellationToken cancellationToken = default)
    {
        ArgumentNullException.ThrowIfNull(request);
        request.Validate();
        if (request.Method is PeftConfig method)
        {
            PeftAdapter.Validate(method, Config);
        }

        int tokensMax = Math.Min(request.SampleTokensMax ?? ContextTokensMax, ContextTokensMax);
        var builder = new SampleBuilder(Config, Tokenizer, ChatTemplate, tokensMax, request.RefuseBadSamples);
        BuiltSamples samples = await Task.Run(() => builder.Build(request.Dataset, cancellationToken), cancellationToken)
            .ConfigureAwait(false);
        return await CallAsync(loop => loop.Jobs.Start(_inbox, request, samples, loop.Now), cancellationToken).ConfigureAwait(false);
    }

    /// <summary>Counters and memory as of the last step.</summary>
    public Task<EngineStatistics> GetStatisticsAsync(CancellationToken cancellationToken = default) =>
        CallAsync(
            loop => new EngineStatistics
            {
                Steps = loop.Counters.Steps,
                TimeInSteps = loop.Counters.TimeInSteps,
                FinetuningSteps = loop.Counters.FinetuningSteps,
                StepsOverBudget = loop.Counters.StepsOverBudget,
                Requests = loop.Counters.Requests,
                RequestsFinished = loop.Counters.Finished,
                RequestsAttained = loop.Counters.Attained,
                RequestsActive = loop.SequenceCount,
                Preemptions = loop.Counters.Preemptions,
                TokensReused = loop.Counters.TokensReused,
                TokensGenerated = loop.Counters.GeneratedTokens,
                TokensTrained = loop.Jobs.TokensTrained,
                MeanTimeToFirstToken = TimeSpan.FromSeconds(loop.Counters.MeanTtft),
                MeanTimePerOutputToken = TimeSpan.FromSeconds(loop.Counters.MeanTpot),
                KvBlocksHeld = loop.BlocksHeld,
                KvBlocksTotal = loop.BlocksTotal,
                KvBlocksMax = loop.BlocksMax,
                DeviceBytes = _backend.AllocatedBytes,
                DeviceBytesMax = loop.Budget.BytesMax,
                JobBytes = loop.Jobs.Bytes,
            },
            cancellationToken);

    /// <summary>Stops after the step in progress and frees the device.</summary>
    public async ValueTask DisposeAsync()
    {
        if (Interlocked.Exchange(ref _disposed, 1) == 0)
        {
            _stopping = true;
            _inbox.Wake();
        }

        await _ended.Task.ConfigureAwait(false);
    }

    /// <summary>Runs an action on the loop thread between two steps.</summary>
    internal Task<T> CallAsync<T>(Func<EngineLoop, T> action, CancellationToken cancellationToken) =>
        _inbox.CallAsync(action, cancellationToken);

    private static CoServingEngine Load(string folder, CoServingOptions options, CancellationToken cancellationToken)
    {
        if (!Directory.Exists(folder))
        {
            throw new InvalidFileException(folder, "folder", "does not exist");
        }

        ModelConfig config = ModelConfig.Load(folder);
        CheckpointFiles files = CheckpointFiles.Load(folder, config);
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(folder);
        return Build(
            (folder, config, files), options, weight => LoadedModel.HeldType(checkpoint.Get(weight.Name), options.WeightType),
            (backend, positions, shard, compiler) => LoadedModel.Load(
                checkpoint, config, backend, options.WeightType, positions, shard, compiler, cancellationToken));
    }

    private static CoServingEngine Build(
        (string Folder, ModelConfig Config, CheckpointFiles Files) source, CoServingOptions options, Func<WeightShape, DType> typeOf,
        Func<IComputeBackend, int, ModelShard?, GraphCompiler, LoadedModel> load)
    {
        ModelConfig config = source.Config;
        int positions = options.ContextTokensMax ?? Math.Min(config.MaxPositions, ContextTokensDefault);
        if (positions > config.MaxPositions)
        {
            throw new ArgumentOutOfRangeException(
                nameof(options), positions, $"ContextTokensMax is above the checkpoint's {config.MaxPositions} positions.");
        }

        if ((long)positions * config.HeadDim > Array.MaxLength)
        {
            throw new ArgumentOutOfRangeException(nameof(options), positions, "ContextTokensMax is too long for a rotary table.");
        }

        IComputeBackend backend = options.Device.CreateBackend();
        LoadedModel? model = null;
        CoServingEngine? engine = null;
        try
        {
            ModelShard? shard = ModelShard.Of(config, backend);
            GraphCompiler compiler = LoadedModel.Compile(config, shard);
            int kvBlocks = EngineMemory.KvBlocksWithin(
                options.DeviceBytesLimit(backend), n => EngineMemory.PlanOf(config, compiler.Forward, backend, options, n, shard), typeOf,
                options, positions);
            model = load(backend, positions, shard, compiler);
            engine = new CoServingEngine(source.Folder, options, backend, model, source.Files, kvBlocks);
            engine.LearnLatency();
            engine._loop.CheckTargets();
            return engine;
        }
        catch (Exception e)
        {
            engine?._loop.Dispose();
            model?.Dispose();
            backend.Dispose();
            if (e is not OutOfMemoryException && backend.IsOutOfMemory(e))
            {
                throw DeviceBudget.RanOut("while the engine loaded", e);
            }

            throw;
        }
    }

    // From a file where there is one, else from the machine.
    private void LearnLatency()
    {
        if (_profile?.TryLoad() is LatencyModel saved)
        {
            _loop.Latency = saved;
            return;
        }

        _loop.Calibrate(_options.ProfilingTimeMax);
        _profile?.Save(_loop.Latency);
    }

    private void StartThread() => new Thread(Run) { IsBackground = true, Name = "FlexLLM engine" }.Start();

    // The loop thread. Whatever goes wrong in here ends the engine, and every waiter learns the cause.
    private void Run()
    {
        Exception ending;
        try
        {
            while (!_stopping)
            {
                if (!_loop.RunStep())
                {
                    _inbox.Wait();
                }
            }

            ending = new ObjectDisposedException(nameof(CoServingEngine));
        }
#pragma warning disable CA1031 // Any exception at all must reach the waiters instead of ending the process.
        catch (Exception e)
#pragma warning restore CA1031
        {
            _fault = new EngineFaultedException("The engine stopped: " + e.Message, e);
            ending = _fault;
        }

        _inbox.Close(ending);
        _ending = ending;
        _closing.Cancel();
        if (_fault is null)
        {
            TakeDown(() => _profile?.Save(_loop.Latency));
        }

        TakeDown(() => _loop.Stop(ending, _fault));
        TakeDown(_loop.Dispose);
        TakeDown(_model.Dispose);
        TakeDown(_backend.Dispose);
        if (_fault is not null)
        {
            _logger.LogError(_fault, "The engine stopped.");
        }

        _ended.TrySetResult();
    }

    // After a fault the state may be broken; freeing the rest matters more than one failure.
    private void TakeDown(Action action)
    {
        try
        {
            action();
        }
#pragma warning disable CA1031 // Nothing may keep the waiters of DisposeAsync waiting.
        catch (Exception e)
#pragma warning restore CA1031
        {
            _logger.LogError(e, "A part of the engine could not be taken down in order.");
        }
    }

    // Readers that never read on keep their places: who waits for one must not wait for them when the engine ends.
    private async Task EnterAsync(CancellationToken cancellationToken)
    {
        using var either = CancellationTokenSource.CreateLinkedTokenSource(cancellationToken, _closing.Token);
        try
        {
            await _places.WaitAsync(either.Token).ConfigureAwait(false);
        }
        catch (OperationCanceledException) when (!cancellationToken.IsCancellationRequested)
        {
            throw _ending!;
        }
    }

    private void WakeLoop()
    {
        if (!_ended.Task.IsCompleted)
        {
            _inbox.Wake();
        }
    }

    private int[] Encode(GenerationRequest request)
    {
        if (request.PromptTokens is not null)
        {
            return [.. request.PromptTokens];
        }

        if (Tokenizer is null)
        {
            throw new RequestRejectedException("The checkpoint has no tokenizer.json: give the prompt as token ids.");
        }

        if (request.Messages is null)
        {
            return Tokenizer.Encode(request.Prompt!);
        }

        return ChatTemplate is null
            ? throw new RequestRejectedException("The checkpoint has no chat template that this library knows: give the prompt as text.")
            : ChatTemplate.Encode(Tokenizer, request.Messages, addGenerationPrompt: true).Ids;
    }

    private void Validate(GenerationRequest request, int[] prompt)
    {
        ArgumentOutOfRangeException.ThrowIfLessThan(request.MaxTokens, 1);
        ArgumentNullException.ThrowIfNull(request.Sampling);
        ArgumentNullException.ThrowIfNull(request.StopSequences);
        request.Sampling.Validate();
        request.Slo?.Validate();
        if (!Enum.IsDefined(request.Class))
        {
            throw new ArgumentOutOfRangeException(nameof(request), request.Class, "Class is none of the request classes.");
        }

        if (request.StopSequences.Count > 0 && Tokenizer is null)
        {
            throw new RequestRejectedException("The checkpoint has no tokenizer.json: stop sequences cannot be matched.");
        }

        if (prompt.Length == 0)
        {
            throw new RequestRejectedException("The prompt has no token.");
        }

        int bad = Array.FindIndex(prompt, id => (uint)id >= (uint)Config.VocabularySize);
        if (bad >= 0)
        {
            throw new RequestRejectedException(
                $"The prompt's token {bad} has id {prompt[bad]}, outside the vocabulary of {Config.VocabularySize}.");
        }

        foreach (int token in request.Sampling.LogitBias?.Keys ?? [])
        {
            if (token >= Config.VocabularySize)
            {
                throw new RequestRejectedException(
                    $"Sampling.LogitBias names token {token}, outside the vocabulary of {Config.VocabularySize}.");
            }
        }
    }
}
