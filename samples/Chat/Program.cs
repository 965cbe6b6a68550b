// Chats with a model in HuggingFace format (LLaMA, Qwen2, Qwen2.5, Qwen3). Answers stream; Ctrl+C cuts one short and, at the
// prompt, ends the program. A model whose chat template is unknown (or that has none) goes on with the text instead.
using System.Text;
using FlexLLM;

const string Usage = """
    dotnet run -c Release --project samples/Chat -- MODEL_FOLDER [--adapter PEFT_FOLDER] [--max-tokens 512]

      MODEL_FOLDER  config.json, *.safetensors and tokenizer.json, as downloaded from HuggingFace
      --adapter     a LoRA adapter that answers instead of the bare model
      --max-tokens  longest answer

    In the chat: /reset forgets the conversation, /exit ends, Ctrl+C cuts an answer short.
    """;

string? modelFolder = null;
string? adapterFolder = null;
int maxTokens = 512;
bool understood = true;
for (int i = 0; i < args.Length; i++)
{
    string? value = i + 1 < args.Length ? args[i + 1] : null;
    switch (args[i])
    {
        case "--adapter" when value is not null:
            adapterFolder = value;
            i++;
            break;
        case "--max-tokens" when int.TryParse(value, out maxTokens) && maxTokens > 0:
            i++;
            break;
        case [not '-', ..] when modelFolder is null:
            modelFolder = args[i];
            break;
        default:
            understood = false;
            break;
    }
}

if (modelFolder is null || !understood)
{
    Console.Error.WriteLine(Usage);
    return 2;
}

Console.OutputEncoding = Encoding.UTF8;
CancellationTokenSource? answering = null;
Console.CancelKeyPress += (_, e) =>
{
    // Without an answer in progress the key does what it always does.
    e.Cancel = answering is not null;
    answering?.Cancel();
};

try
{
    await using CoServingEngine engine = await CoServingEngine.LoadAsync(modelFolder);
    string? adapter = adapterFolder is null ? null : (await engine.Adapters.LoadAsync("chat", adapterFolder)).Name;
    Console.WriteLine(
        $"{engine.Config.Architecture}, {engine.Config.LayerCount} layers, context {engine.ContextTokensMax} tokens, adapter " +
        $"{adapterFolder ?? "none"}, template {engine.ChatTemplate?.Name ?? "none: your text is continued"}. /reset, /exit");
    return await ChatAsync(engine, adapter);
}
catch (FlexLlmException e)
{
    Console.Error.WriteLine(e.Message);
    return 1;
}

// One line, one answer, until the end of the input. 1 when a turn was refused.
async Task<int> ChatAsync(CoServingEngine engine, string? adapter)
{
    List<ChatMessage> conversation = [];
    int status = 0;
    while (true)
    {
        Console.Write("\n> ");
        string? line = Console.ReadLine();
        switch (line?.Trim())
        {
            case null or "/exit":
                return status;
            case "": continue;
            case "/reset":
                conversation.Clear();
                Console.WriteLine("Forgotten.");
                continue;
            default:
                conversation.Add(new ChatMessage("user", line));
                break;
        }

        try
        {
            answering = new CancellationTokenSource();
            conversation.Add(new ChatMessage("assistant", await AnswerAsync(engine, adapter, conversation, answering.Token)));
        }
        catch (RequestRejectedException e)
        {
            // Most likely a conversation that has outgrown the context; the chat itself can go on.
            conversation.RemoveAt(conversation.Count - 1);
            Console.Error.WriteLine(e.Message);
            status = 1;
        }
        finally
        {
            answering = null;
        }
    }
}

async Task<string> AnswerAsync(CoServingEngine engine, string? adapter, List<ChatMessage> conversation, CancellationToken cancel)
{
    GenerationRequest request = engine.ChatTemplate is not null
        ? new GenerationRequest(conversation)
        : new GenerationRequest(string.Join('\n', conversation.Select(m => m.Content)));
    request = request with { Adapter = adapter, MaxTokens = maxTokens };
    TimeProvider clock = TimeProvider.System;
    long asked = clock.GetTimestamp();
    long? firstToken = null;
    int tokens = 0;
    string ending = "cancelled";
    var answer = new StringBuilder();
    try
    {
        await foreach (GeneratedToken token in engine.GenerateAsync(request, cancel))
        {
            firstToken ??= clock.GetTimestamp();
            tokens += token.TokenId >= 0 ? 1 : 0;
            answer.Append(token.Text);
            Console.Write(token.Text);
            ending = token.FinishDetail ?? token.FinishReason?.ToString().ToLowerInvariant() ?? ending;
        }
    }
    catch (OperationCanceledException)
    {
        // What was said so far stays part of the conversation.
    }

    if (firstToken is long first)
    {
        double waited = clock.GetElapsedTime(asked, first).TotalMilliseconds;
        double seconds = clock.GetElapsedTime(first).TotalSeconds;
        string speed = tokens > 1 ? $"{(tokens - 1) / seconds:F1} tokens/s" : "one token";
        Console.WriteLine($"\n[{ending}: {tokens} tokens, TTFT {waited:F0} ms, {speed}]");
    }

    return answer.ToString();
}
