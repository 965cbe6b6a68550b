using System.Text.Json;
using FlexLLM.Formats;

namespace FlexLLM;

/// <summary>One thing to learn: a text, a prompt with its completion, a conversation, or token ids.</summary>
public sealed record TrainingExample
{
    private TrainingExample()
    {
    }

    /// <summary>Text whose every token carries loss, or null.</summary>
    public string? Text { get; private init; }

    /// <summary>Prompt of a completion, or null.</summary>
    public string? Prompt { get; private init; }

    /// <summary>Completion that carries loss, or null.</summary>
    public string? Completion { get; private init; }

    /// <summary>Conversation whose assistant turns carry loss, or null.</summary>
    public IReadOnlyList<ChatMessage>? Messages { get; private init; }

    /// <summary>Token ids, or null.</summary>
    public IReadOnlyList<int>? Tokens { get; private init; }

    /// <summary>For token ids: which of them must be predicted.</summary>
    public IReadOnlyList<bool>? CarriesLoss { get; private init; }

    /// <summary>A text to continue; an end-of-sequence token is put behind it.</summary>
    public static TrainingExample FromText(string text)
    {
        ArgumentNullException.ThrowIfNull(text);
        return new TrainingExample { Text = text };
    }

    /// <summary>
    /// A completion to give to a prompt; the loss is on the completion and the end-of-sequence token behind it.
    /// </summary>
    public static TrainingExample FromCompletion(string prompt, string completion)
    {
        ArgumentNullException.ThrowIfNull(prompt);
        ArgumentNullException.ThrowIfNull(completion);
        return new TrainingExample { Prompt = prompt, Completion = completion };
    }

    /// <summary>A conversation in the model's chat template; the loss is on assistant turns.</summary>
    public static TrainingExample FromMessages(IReadOnlyList<ChatMessage> messages)
    {
        ArgumentNullException.ThrowIfNull(messages);
        return new TrainingExample { Messages = messages };
    }

    /// <summary>Token ids taken as they are.</summary>
    /// <param name="tokens">Ids of the model's vocabulary.</param>
    /// <param name="carriesLoss">One entry a token: whether it must be predicted. The first token never is.</param>
    public static TrainingExample FromTokens(IReadOnlyList<int> tokens, IReadOnlyList<bool> carriesLoss)
    {
        ArgumentNullException.ThrowIfNull(tokens);
        ArgumentNullException.ThrowIfNull(carriesLoss);
        ArgumentOutOfRangeException.ThrowIfNotEqual(carriesLoss.Count, tokens.Count, nameof(carriesLoss));
        return new TrainingExample { Tokens = tokens, CarriesLoss = carriesLoss };
    }
}

/// <summary>Examples for a finetuning job.</summary>
public abstract class TrainingDataset
{
    /// <summary>A dataset in memory.</summary>
    public static TrainingDataset FromExamples(IReadOnlyList<TrainingExample> examples)
    {
        ArgumentNullException.ThrowIfNull(examples);
        return new InMemory(examples);
    }

    /// <summary>The examples in order, each with the file and the place that errors name.</summary>
    internal abstract IEnumerable<(string File, string Place, TrainingExample Example)> Read();

    private sealed class InMemory(IReadOnlyList<TrainingExample> examples) : TrainingDataset
    {
        internal override IEnumerable<(string File, string Place, TrainingExample Example)> Read() =>
            examples.Select((example, index) => ("dataset", $"example {index + 1}", example));
    }
}

/// <summary>
/// A JSONL file, one example a line: {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [{"role": ...,
/// "content": ...}, ...]}. Read when a job starts.
/// </summary>
public sealed class JsonlDataset : TrainingDataset
{
    private readonly string _path;

    private JsonlDataset(string path) => _path = path;

    /// <summary>Names the file; its lines are read when a job starts.</summary>
    /// <exception cref="InvalidFileException">The file does not exist.</exception>
    public static JsonlDataset Open(string path)
    {
        ArgumentException.ThrowIfNullOrEmpty(path);
        return File.Exists(path) ? new JsonlDataset(path) : throw new InvalidFileException(path, "file", "does not exist");
    }

    /// <summary>Reads and checks the lines.</summary>
    /// <exception cref="InvalidFileException">A line that is not one of the three forms; the error names it.</exception>
    internal override IEnumerable<(string File, string Place, TrainingExample Example)> Read()
    {
        using JsonlReader reader = JsonlReader.Open(_path);
        while (reader.TryRead(out JsonlLine line))
        {
            string place = $"line {line.Number}";
            yield return (_path, place, Parse(line.Value, place));
        }
    }

    private TrainingExample Parse(JsonElement line, string place)
    {
        if (line.ValueKind != JsonValueKind.Object)
        {
            throw Fault(place, "must be a JSON object");
        }

        if (line.TryGetProperty("text", out JsonElement text))
        {
            return TrainingExample.FromText(StringOf(text, place, "text"));
        }

        if (line.TryGetProperty("prompt", out JsonElement prompt) && line.TryGetProperty("completion", out JsonElement completion))
        {
            return TrainingExample.FromCompletion(StringOf(prompt, place, "prompt"), StringOf(completion, place, "completion"));
        }

        if (line.TryGetProperty("messages", out JsonElement messages))
        {
            return TrainingExample.FromMessages(MessagesOf(messages, place));
        }

        throw Fault(place, "needs \"text\", \"prompt\" and \"completion\", or \"messages\"");
    }

    private List<ChatMessage> MessagesOf(JsonElement messages, string place)
    {
        if (messages.ValueKind != JsonValueKind.Array || messages.GetArrayLength() == 0)
        {
            throw Fault($"{place}, messages", "must be an array with at least one message");
        }

        var result = new List<ChatMessage>();
        foreach (JsonElement message in messages.EnumerateArray())
        {
            string here = $"messages[{result.Count}]";
            if (message.ValueKind != JsonValueKind.Object || !message.TryGetProperty("role", out JsonElement role) ||
                !message.TryGetProperty("content", out JsonElement content))
            {
                throw Fault($"{place}, {here}", "must be an object with \"role\" and \"content\"");
            }

            result.Add(new ChatMessage(StringOf(role, place, $"{here}.role"), StringOf(content, place, $"{here}.content")));
        }

        return result;
    }

    private string StringOf(JsonElement value, string place, string field) => value.ValueKind == JsonValueKind.String
        ? value.GetString()!
        : throw Fault($"{place}, {field}", $"must be a string, not {value.ValueKind}");

    private InvalidFileException Fault(string place, string fault) => new(_path, place, fault);
}
