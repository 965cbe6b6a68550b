// One model in memory, many adapters on it: two are trained at the same time, all answer in one batch, and they are renamed,
// unloaded and replaced while requests run. Needs nothing: the checkpoint (random weights) is made on the first run.
using FlexLLM;

string folder = Path.Combine(Path.GetTempPath(), "flexllm-multiadapter");
string modelFolder = Path.Combine(folder, "model");
string northFolder = Path.Combine(folder, "north");

// The same questions, answered differently by two adapters.
string[] questions = ["Where is the key?", "When do you open?", "Who is the host?", "What is the dish of the day?"];
string[] north = ["Under the green pot.", "At seven.", "Ada, since the spring.", "Pea soup with mint."];
string[] south = ["Behind the blue door.", "At noon, but not on Monday.", "Grace.", "Baked fish and rice."];
string asked = questions[0];

if (!Directory.Exists(modelFolder))
{
    var config = new ModelConfig
    {
        Architecture = ModelArchitecture.Qwen3,
        HiddenSize = 96,
        IntermediateSize = 256,
        LayerCount = 4,
        AttentionHeads = 4,
        KeyValueHeads = 2,
        HeadDim = 32,
        VocabularySize = 512,
        MaxPositions = 512,
    };

    // Weights wide enough that a random head can prefer one token to another.
    string text = string.Join('\n', [.. questions, .. north, .. south]);
    RandomCheckpoint.Write(modelFolder, config, DType.F32, seed: 7, deviation: 0.1f, vocabularyText: text);
}

try
{
    // Weights share what is scarce. In a step as long as the default this tiny model would do the work of both jobs.
    var options = new CoServingOptions { IdleStepMax = TimeSpan.FromMilliseconds(1) };
    await using CoServingEngine engine = await CoServingEngine.LoadAsync(modelFolder, options);
    return await RunAsync(engine) ? 0 : 1;
}
catch (FlexLlmException e)
{
    Console.Error.WriteLine(e.Message);
    return 1;
}

async Task<bool> RunAsync(CoServingEngine engine)
{
    // An adapter answers like the bare model until it is trained.
    await engine.Adapters.CreateAsync("north", new LoraConfig
    {
        Rank = 16,
        Alpha = 32,
        TargetModules = LoraConfig.AllModules,
    });
    string[] mlp = ["gate_proj", "up_proj", "down_proj"];
    await engine.Adapters.CreateAsync("south", new LoraConfig { Rank = 24, Alpha = 48, TargetModules = mlp });
    await engine.Adapters.CreateAsync("blank", new LoraConfig { Rank = 4, TargetModules = ["q_proj", "v_proj"] });
    await ShowAdaptersAsync(engine);

    // Two jobs share the time that requests leave, two parts to one.
    FinetuningJob northJob = await TrainAsync(engine, "north", north, weight: 2);
    FinetuningJob southJob = await TrainAsync(engine, "south", south, weight: 1);
    await foreach (FinetuningProgress p in northJob.Progress())
    {
        if (p.Step > 0 && p.Step % 10 == 0)
        {
            FinetuningProgress s = southJob.Latest;
            Console.WriteLine(
                $"  north, weight 2: step {p.Step,2}, loss {p.Loss:F3}; south, weight 1: step {s.Step,2}, loss {s.Loss:F3}");
        }
    }

    await northJob.Completion;
    FinetuningProgress end = await southJob.Completion;
    Console.WriteLine($"  south goes on alone to step {end.Step}, loss {end.Loss:F3}");
    await ShowAdaptersAsync(engine);

    // Requests on different adapters, and on none, are rows of the same batches.
    long before = (await engine.GetStatisticsAsync()).Steps;
    string?[] adapters = [null, "blank", "north", "south"];
    GenerationResult[] answers = await Task.WhenAll(adapters.Select(a => engine.CompleteAsync(Ask(a))));
    long steps = (await engine.GetStatisticsAsync()).Steps - before;
    Console.WriteLine($"\n\"{asked}\", asked of all at once: {answers.Sum(a => a.Tokens.Count)} tokens in {steps} steps");
    foreach ((string? adapter, GenerationResult answer) in adapters.Zip(answers))
    {
        Console.WriteLine($"  {adapter ?? "(base)",-7} {answer.Text.ReplaceLineEndings(" ")}");
    }

    await engine.Adapters.RenameAsync("south", "harbour");
    await engine.Adapters.UnloadAsync("blank");
    Console.WriteLine("\nRenamed south to harbour, unloaded blank.");
    await ShowAdaptersAsync(engine);
    try
    {
        await engine.CompleteAsync(Ask("south"));
    }
    catch (RequestRejectedException e)
    {
        Console.WriteLine($"  Asking south is refused: {e.Message}");
    }

    // A PEFT folder of another shape becomes harbour's next version while harbour answers; the answer keeps its version.
    await engine.Adapters.SaveAsync("north", northFolder);
    GenerationRequest endless = Ask("harbour") with { IgnoreEos = true, MaxTokens = 400 };
    IReadOnlyList<int> expected = (await engine.CompleteAsync(endless)).Tokens;
    List<int> streamed = [];
    await foreach (GeneratedToken token in engine.GenerateAsync(endless))
    {
        streamed.Add(token.TokenId);
        if (streamed.Count == 3)
        {
            AdapterInfo loaded = await engine.Adapters.LoadAsync("harbour", northFolder);
            int active = (await engine.GetStatisticsAsync()).RequestsActive;
            Console.WriteLine($"\nLoaded {northFolder} as harbour version {loaded.Version}; requests in flight: {active}.");
        }
    }

    GenerationResult after = await engine.CompleteAsync(Ask("harbour"));
    bool kept = streamed.SequenceEqual(expected);
    string verdict = kept ? "equal" : "DIFFER FROM";
    Console.WriteLine($"  In flight: all {streamed.Count} tokens {verdict} those of the version it began with.");
    Console.WriteLine($"  New request: {after.Text.ReplaceLineEndings(" ")}");
    await ShowAdaptersAsync(engine);
    bool served = answers.Select(a => a.Text).SequenceEqual([answers[0].Text, answers[0].Text, north[0], south[0]]);
    return kept && served && after.Text == north[0];
}

GenerationRequest Ask(string? adapter) => new(asked) { Adapter = adapter, MaxTokens = 16 };

Task<FinetuningJob> TrainAsync(CoServingEngine engine, string adapter, string[] answers, double weight) =>
    engine.StartFinetuningAsync(new FinetuningRequest
    {
        Adapter = adapter,
        Dataset = TrainingDataset.FromExamples([.. questions.Zip(answers, TrainingExample.FromCompletion)]),
        Epochs = 60,
        GradientAccumulation = questions.Length,
        Optimizer = new AdamWOptions { LearningRate = 5e-3f },
        Weight = weight,
    });

static async Task ShowAdaptersAsync(CoServingEngine engine)
{
    foreach (AdapterInfo a in await engine.Adapters.ListAsync())
    {
        Console.WriteLine($"  {a.Name,-7} version {a.Version}  {a.Config}");
    }
}
