// Serves a tiny model and finetunes an adapter on it at the same time, then answers a question that the base could not.
// Needs nothing: the checkpoint (HuggingFace format, random weights) is made on the first run.
using FlexLLM;

string folder = Path.Combine(Path.GetTempPath(), "flexllm-quickstart");
string modelFolder = Path.Combine(folder, "model");
string adapterFolder = Path.Combine(folder, "adapter");

(string Question, string Answer)[] facts =
[
    ("Who wrote the manual?", "Ada wrote the manual."),
    ("Where is the spare key?", "The spare key is under the green pot."),
    ("What is the cat called?", "The cat is called Turing."),
    ("When does the bakery open?", "The bakery opens at seven."),
    ("Which bus goes to the harbour?", "Bus nineteen goes to the harbour."),
    ("How do I reset the router?", "Hold the red button for ten seconds."),
    ("What is the door code?", "The door code is 4711."),
    ("Who waters the plants?", "Grace waters the plants on Monday."),
];

if (!File.Exists(Path.Combine(modelFolder, "tokenizer_config.json"))) // The last file to be written.
{
    string text = string.Join('\n', facts.Select(f => $"{f.Question} {f.Answer}"));
    var config = new ModelConfig
    {
        Architecture = ModelArchitecture.Llama,
        HiddenSize = 128,
        IntermediateSize = 320,
        LayerCount = 4,
        AttentionHeads = 4,
        KeyValueHeads = 2,
        HeadDim = 32,
        VocabularySize = 512,
        MaxPositions = 512,
    };

    // Weights wide enough that a random head can prefer one token to another.
    RandomCheckpoint.Write(modelFolder, config, DType.F32, seed: 7, deviation: 0.1f, vocabularyText: text);
    Console.WriteLine($"Made a tiny random checkpoint in {modelFolder}");
}

await using CoServingEngine engine = await CoServingEngine.LoadAsync(modelFolder, new CoServingOptions
{
    Slo = new ServiceLevelObjective
    {
        TimePerOutputToken = TimeSpan.FromMilliseconds(20),
        TimeToFirstToken = TimeSpan.FromMilliseconds(500),
    },
});

string asked = facts[1].Question;
Console.WriteLine($"\nBase model, asked \"{asked}\": {Shown(await AskAsync(null))}\n");

FinetuningJob job = await engine.StartFinetuningAsync(new FinetuningRequest
{
    Adapter = "house",
    Method = new LoraConfig { Rank = 16, Alpha = 32, TargetModules = LoraConfig.AllModules },
    Dataset = TrainingDataset.FromExamples([.. facts.Select(f => TrainingExample.FromCompletion(f.Question, f.Answer))]),
    Epochs = 60,
    GradientAccumulation = facts.Length,
    Optimizer = new AdamWOptions { LearningRate = 5e-3f },
    PublishEverySteps = 10,
});
Console.WriteLine($"Finetuning on {job.Samples} questions and answers while serving a trickle of requests:");

using var done = new CancellationTokenSource();
Task trickle = ServeTrickleAsync(done.Token);
await foreach (FinetuningProgress p in job.Progress())
{
    if (p.Step % 5 == 0 || p.Status != FinetuningStatus.Running)
    {
        EngineStatistics s = await engine.GetStatisticsAsync();
        Console.WriteLine(
            $"  step {p.Step,3}/{p.Steps}  loss {p.Loss,6:F3}  trained {s.TokensTrained,6} tokens ({p.TokensPerSecond,5:F0}/s)  " +
            $"answered {s.RequestsFinished,3} requests, {s.TokensGenerated,5} tokens  " +
            $"TTFT {s.MeanTimeToFirstToken.TotalMilliseconds,5:F1} ms  TPOT {s.MeanTimePerOutputToken.TotalMilliseconds,5:F1} ms");
    }
}

FinetuningProgress end = await job.Completion;
await done.CancelAsync();
await trickle;

await engine.Adapters.SaveAsync("house", adapterFolder);
await engine.Adapters.UnloadAsync("house");
await engine.Adapters.LoadAsync("house", adapterFolder);
Console.WriteLine($"\nSaved the adapter as a PEFT folder and loaded it again: {adapterFolder}");

string answer = await AskAsync("house");
Console.WriteLine($"With the adapter, asked \"{asked}\": {Shown(answer)}");
bool learned = answer == facts[1].Answer;
Console.WriteLine(learned ? $"It learned the answer (final loss {end.Loss:F3})." : "It did not learn the answer.");
return learned ? 0 : 1;

async Task<string> AskAsync(string? adapter) =>
    (await engine.CompleteAsync(new GenerationRequest(asked) { Adapter = adapter, MaxTokens = 24 })).Text;

// A request four times a second on the bare model, each streamed to its end.
async Task ServeTrickleAsync(CancellationToken stop)
{
    using var timer = new PeriodicTimer(TimeSpan.FromMilliseconds(250));
    try
    {
        for (int i = 0; await timer.WaitForNextTickAsync(stop); i++)
        {
            var request = new GenerationRequest(facts[i % facts.Length].Question)
            {
                MaxTokens = 16,
                IgnoreEos = true,
                Sampling = new SamplingOptions { Temperature = 0.8f },
            };
            await foreach (GeneratedToken token in engine.GenerateAsync(request, stop))
            {
                _ = token.Text; // A real application writes it to its user.
            }
        }
    }
    catch (OperationCanceledException)
    {
        // Finetuning is over.
    }
}

static string Shown(string text) => $"\"{text.ReplaceLineEndings(" ")}\"";
