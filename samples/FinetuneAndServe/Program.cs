// Finetunes a LoRA adapter on a JSONL file and answers questions with its newest version at the same time, in one process.
// Ctrl+C writes a checkpoint; the same command with --resume goes on from there.
using FlexLLM;

const string Usage = """
    dotnet run -c Release --project samples/FinetuneAndServe -- MODEL_FOLDER TRAIN.jsonl [options]
      --adapter NAME     name of the adapter (tuned)
      --out FOLDER       where to save it as a PEFT folder (adapter-NAME); checkpoints go to FOLDER.checkpoint
      --rank 16          rank of the adapter
      --modules all      or a list such as q_proj,v_proj,down_proj
      --epochs 1         passes over the file
      --lr 2e-4          learning rate of AdamW
      --resume FOLDER    go on from a checkpoint of the same training
      --chat             ask in the model's chat template; default: prompts are continued as they are
    Each line of the file is {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}.
    Type prompts while it trains; Ctrl+D (end of input) or /exit stops asking, Ctrl+C writes a checkpoint and ends.
    """;

string[] names = ["--adapter", "--out", "--rank", "--modules", "--epochs", "--lr", "--resume"];
var options = new Dictionary<string, string>();
bool chat = false;
List<string> paths = [];
bool understood = true;
for (int i = 0; i < args.Length; i++)
{
    if (names.Contains(args[i]) && i + 1 < args.Length)
    {
        options[args[i]] = args[++i];
    }
    else if (args[i] == "--chat")
    {
        chat = true;
    }
    else
    {
        understood &= !args[i].StartsWith('-');
        paths.Add(args[i]);
    }
}

understood &= int.TryParse(options.GetValueOrDefault("--rank", "16"), out int rank);
understood &= int.TryParse(options.GetValueOrDefault("--epochs", "1"), out int epochs);
understood &= float.TryParse(options.GetValueOrDefault("--lr", "2e-4"), out float learningRate);
if (!understood || paths.Count != 2)
{
    Console.Error.WriteLine(Usage);
    return 2;
}

string adapter = options.GetValueOrDefault("--adapter", "tuned");
string output = options.GetValueOrDefault("--out", $"adapter-{adapter}");
string modules = options.GetValueOrDefault("--modules", "all");
IReadOnlyList<string> targets = modules == "all" ? LoraConfig.AllModules : modules.Split(',', StringSplitOptions.TrimEntries);

using var stop = new CancellationTokenSource();
Console.CancelKeyPress += (_, e) =>
{
    // The first one writes a checkpoint, a second one ends the program at once.
    e.Cancel = !stop.IsCancellationRequested;
    stop.Cancel();
};

try
{
    await using CoServingEngine engine = await CoServingEngine.LoadAsync(paths[0]);
    FinetuningJob job = await engine.StartFinetuningAsync(new FinetuningRequest
    {
        Adapter = adapter,
        Method = new LoraConfig { Rank = rank, Alpha = 2 * rank, TargetModules = targets },
        Dataset = JsonlDataset.Open(paths[1]),
        Epochs = epochs,
        GradientAccumulation = 4,
        Optimizer = new AdamWOptions { LearningRate = learningRate },
        PublishEverySteps = 10,
        ResumeFrom = options.GetValueOrDefault("--resume"),
    });
    Console.WriteLine($"Training '{adapter}' on {job.Samples} samples ({job.SkippedSamples} skipped), {job.Latest.Steps} steps.");

    Task<bool> training = TrainAsync(engine, job);
    Task serving = ServeAsync(engine);
    bool trained = await training;
    await serving;
    return trained ? 0 : 130;
}
catch (FlexLlmException e)
{
    Console.Error.WriteLine(e.Message);
    return 1;
}

// A line for every second, and the folder at the end. False when it was interrupted and left a checkpoint.
async Task<bool> TrainAsync(CoServingEngine engine, FinetuningJob job)
{
    long shown = 0;
    try
    {
        await foreach (FinetuningProgress p in job.Progress(stop.Token))
        {
            bool due = p.Status != FinetuningStatus.Running || TimeProvider.System.GetElapsedTime(shown).TotalSeconds >= 1;
            if (due && p.TokensDone > 0)
            {
                shown = TimeProvider.System.GetTimestamp();
                EngineStatistics s = await engine.GetStatisticsAsync();
                Console.WriteLine(
                    $"step {p.Step,4}/{p.Steps}  loss {p.Loss,6:F3}  {p.TokensPerSecond,6:F0} tokens/s  " +
                    $"{p.Remaining:hh\\:mm\\:ss} left  " +
                    $"answered {s.RequestsFinished}, TPOT {s.MeanTimePerOutputToken.TotalMilliseconds:F0} ms");
            }
        }
    }
    catch (OperationCanceledException)
    {
        // Ctrl+C, which may come just as the job ends.
    }

    if (!job.Completion.IsCompleted)
    {
        int step = await job.SaveCheckpointAsync(output + ".checkpoint");
        Console.WriteLine($"Interrupted at step {step}; go on with: --resume {output}.checkpoint");
        return false;
    }

    await job.Completion; // Throws the cause where the job failed.
    await engine.Adapters.SaveAsync(adapter, output);
    Console.WriteLine($"Trained; saved as a PEFT folder: {output}");
    return true;
}

// Answers one prompt after another, typed or piped, during the training and after it, until they end. Answers are printed
// whole: streamed ones would be torn by the progress lines.
async Task ServeAsync(CoServingEngine engine)
{
    try
    {
        while (await Task.Run(Console.ReadLine).WaitAsync(stop.Token) is string prompt && prompt.Trim() != "/exit")
        {
            GenerationRequest request = chat ? new([new ChatMessage("user", prompt)]) : new(prompt);
            try
            {
                request = request with { Adapter = adapter, MaxTokens = 64 };
                GenerationResult answer = await engine.CompleteAsync(request, stop.Token);
                Console.WriteLine($"> {prompt}\n{answer.Text.ReplaceLineEndings(" ")} [{answer.Tokens.Count} tokens]");
            }
            catch (RequestRejectedException e)
            {
                Console.Error.WriteLine(e.Message); // This prompt's fault; training and the next prompt go on.
            }
        }
    }
    catch (OperationCanceledException)
    {
        // Ctrl+C.
    }
}
