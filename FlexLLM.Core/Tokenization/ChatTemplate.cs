using System.Text;
using System.Text.Json;
using FlexLLM.Tokenization;

namespace FlexLLM;

/// <summary>One turn of a conversation.</summary>
/// <param name="Role">system, user or assistant (ChatML and Llama 3 take other roles too, such as tool).</param>
/// <param name="Content">What was said. Spellings of special tokens in it are plain text.</param>
public sealed record ChatMessage(string Role, string Content);

/// <summary>A conversation as token ids.</summary>
/// <param name="Ids">Token ids, the beginning-of-text token included where the template has one.</param>
/// <param name="AssistantMask">
/// For each id: whether it belongs to what an assistant says, its end-of-turn token included. These are the tokens that
/// finetuning on a conversation learns to say.
/// </param>
public sealed record EncodedChat(int[] Ids, bool[] AssistantMask);

/// <summary>
/// How a model family writes a conversation. These are the plain forms of published templates, not an interpreter of their
/// Jinja text: no tools, no dates (the system header of Llama 3.1 and later has one), no treatment of thinking (Qwen3).
/// </summary>
public sealed class ChatTemplate
{
    private const string ImStart = "<|im_start|>";
    private const string ImEnd = "<|im_end|>";
    private const string System = "system";
    private const string User = "user";
    private const string Assistant = "assistant";

    private readonly Action<IReadOnlyList<ChatMessage>, bool, List<Segment>> _write;

    private ChatTemplate(string name, Action<IReadOnlyList<ChatMessage>, bool, List<Segment>> write)
    {
        Name = name;
        _write = write;
    }

    private enum Kind
    {
        /// <summary>A special token.</summary>
        Token,

        /// <summary>A special token that an assistant ends its turn with.</summary>
        AssistantToken,

        Text,

        AssistantText,
    }

    /// <summary>Llama 3: header tokens around the role, contents trimmed.</summary>
    public static ChatTemplate Llama3 { get; } = new(nameof(Llama3), WriteLlama3);

    /// <summary>Llama 2: [INST] around what users say, the system message inside the first; users and assistants
    /// alternate.</summary>
    public static ChatTemplate Llama2 { get; } = new(nameof(Llama2), WriteLlama2);

    /// <summary>ChatML without a system message of its own, as in Qwen3.</summary>
    public static ChatTemplate ChatMl { get; } = new(nameof(ChatMl), (m, g, o) => WriteChatMl(null, m, g, o));

    /// <summary>ChatML as in Qwen2, with its system message where the conversation starts without one.</summary>
    public static ChatTemplate Qwen2 { get; } =
        new(nameof(Qwen2), (m, g, o) => WriteChatMl("You are a helpful assistant.", m, g, o));

    /// <summary>ChatML as in Qwen2.5, with its system message where the conversation starts without one.</summary>
    public static ChatTemplate Qwen25 { get; } = new(
        nameof(Qwen25),
        (m, g, o) => WriteChatMl("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", m, g, o));

    /// <summary>Name of the built-in form.</summary>
    public string Name { get; }

    /// <summary>
    /// The built-in form nearest to a model folder's own template (chat_template.jinja, else chat_template of
    /// tokenizer_config.json), told by the marks in its text; null where there is none, or no known mark.
    /// </summary>
    /// <exception cref="InvalidFileException">tokenizer_config.json is malformed.</exception>
    public static ChatTemplate? Detect(string folder)
    {
        ArgumentException.ThrowIfNullOrEmpty(folder);
        string? text = TemplateText(folder);
        return text switch
        {
            null => null,
            _ when Has("<|start_header_id|>") => Llama3,
            _ when Has(ImStart) && Has("You are Qwen, created by Alibaba Cloud") => Qwen25,
            _ when Has(ImStart) && Has("You are a helpful assistant") => Qwen2,
            _ when Has(ImStart) => ChatMl,
            _ when Has("[INST]") && Has("<<SYS>>") => Llama2,
            _ => null,
        };

        bool Has(string mark) => text.Contains(mark, StringComparison.Ordinal);
    }

    /// <summary>The conversation as text, special tokens spelled out. To get ids, use <see cref="Encode"/>: it keeps what
    /// looks like special tokens inside the messages apart from real ones.</summary>
    /// <param name="messages">The turns in order.</param>
    /// <param name="addGenerationPrompt">End with what an assistant's turn starts with, for the model to go on.</param>
    /// <exception cref="ArgumentException">The template does not allow this order of roles.</exception>
    public string Render(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        StringBuilder text = new();
        foreach (Segment segment in Segments(messages, addGenerationPrompt))
        {
            text.Append(segment.Text);
        }

        return text.ToString();
    }

    /// <summary>
    /// The conversation as ids. An assistant's words are encoded apart from the header before them, so that they follow the
    /// same ids as when the model goes on from a generation prompt.
    /// </summary>
    /// <param name="tokenizer">A tokenizer that has the template's special tokens.</param>
    /// <param name="messages">The turns in order.</param>
    /// <param name="addGenerationPrompt">End with what an assistant's turn starts with, for the model to go on.</param>
    /// <exception cref="ArgumentException">The template does not allow this order of roles, or the tokenizer lacks one of its
    /// special tokens.</exception>
    public EncodedChat Encode(Tokenizer tokenizer, IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt = false)
    {
        ArgumentNullException.ThrowIfNull(tokenizer);
        List<int> ids = [];
        List<bool> mask = [];
        StringBuilder text = new();
        Kind textKind = Kind.Text;
        TextPlace place = TextPlace.Start;
        foreach (Segment segment in Segments(messages, addGenerationPrompt))
        {
            if (text.Length > 0 && segment.Kind != textKind)
            {
                FlushText();
            }

            if (segment.Kind is Kind.Text or Kind.AssistantText)
            {
                textKind = segment.Kind;
                text.Append(segment.Text);
                continue;
            }

            ids.Add(tokenizer.IdOf(segment.Text) ?? throw new ArgumentException(
                $"The tokenizer has no token '{segment.Text}', which the chat template {Name} needs.", nameof(tokenizer)));
            mask.Add(segment.Kind == Kind.AssistantToken);
            place = TextPlace.Inside;
        }

        FlushText();
        return new EncodedChat([.. ids], [.. mask]);

        void FlushText()
        {
            tokenizer.EncodeTo(ids, text.ToString(), parseSpecialTokens: false, place);
            while (mask.Count < ids.Count)
            {
                mask.Add(textKind == Kind.AssistantText);
            }

            text.Clear();
            place = TextPlace.Continued;
        }
    }

    private List<Segment> Segments(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt)
    {
        ArgumentNullException.ThrowIfNull(messages);
        if (messages.Count == 0)
        {
            throw new ArgumentException("A conversation has at least one message.", nameof(messages));
        }

        foreach (ChatMessage message in messages)
        {
            ArgumentException.ThrowIfNullOrEmpty(message?.Role, nameof(messages));
            ArgumentNullException.ThrowIfNull(message.Content, nameof(messages));
        }

        List<Segment> segments = [];
        _write(messages, addGenerationPrompt, segments);
        return segments;
    }

    private static void WriteChatMl(
        string? defaultSystem, IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt, List<Segment> output)
    {
        if (defaultSystem is not null && messages[0].Role != System)
        {
            messages = [new ChatMessage(System, defaultSystem), .. messages];
        }

        foreach (ChatMessage message in messages)
        {
            bool assistant = message.Role == Assistant;
            output.Add(new Segment(Kind.Token, ImStart));
            output.Add(new Segment(Kind.Text, message.Role + "\n"));
            output.Add(new Segment(assistant ? Kind.AssistantText : Kind.Text, message.Content));
            output.Add(new Segment(assistant ? Kind.AssistantToken : Kind.Token, ImEnd));
            output.Add(new Segment(Kind.Text, "\n"));
        }

        if (addGenerationPrompt)
        {
            output.Add(new Segment(Kind.Token, ImStart));
            output.Add(new Segment(Kind.Text, Assistant + "\n"));
        }
    }

    private static void WriteLlama3(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt, List<Segment> output)
    {
        output.Add(new Segment(Kind.Token, "<|begin_of_text|>"));
        foreach (ChatMessage message in messages)
        {
            bool assistant = message.Role == Assistant;
            WriteHeader(message.Role);
            output.Add(new Segment(assistant ? Kind.AssistantText : Kind.Text, message.Content.Trim()));
            output.Add(new Segment(assistant ? Kind.AssistantToken : Kind.Token, "<|eot_id|>"));
        }

        if (addGenerationPrompt)
        {
            WriteHeader(Assistant);
        }

        void WriteHeader(string role)
        {
            output.Add(new Segment(Kind.Token, "<|start_header_id|>"));
            output.Add(new Segment(Kind.Text, role));
            output.Add(new Segment(Kind.Token, "<|end_header_id|>"));
            output.Add(new Segment(Kind.Text, "\n\n"));
        }
    }

    // A generation prompt adds nothing: what the user says already ends with [/INST].
    private static void WriteLlama2(IReadOnlyList<ChatMessage> messages, bool addGenerationPrompt, List<Segment> output)
    {
        int first = messages[0].Role == System ? 1 : 0;
        string system = first == 1 ? $"<<SYS>>\n{messages[0].Content}\n<</SYS>>\n\n" : string.Empty;
        if (messages.Count == first)
        {
            throw new ArgumentException("Llama 2 has no form for a system message alone.", nameof(messages));
        }

        for (int i = first; i < messages.Count; i++)
        {
            bool user = (i - first) % 2 == 0;
            if (messages[i].Role != (user ? User : Assistant))
            {
                throw new ArgumentException(
                    "Llama 2 takes at most one system message, then user and assistant in turn.", nameof(messages));
            }

            string content = messages[i].Content;
            if (user)
            {
                output.Add(new Segment(Kind.Token, "<s>"));
                output.Add(new Segment(Kind.Text, $"[INST] {((i == first ? system : string.Empty) + content).Trim()} [/INST]"));
            }
            else
            {
                output.Add(new Segment(Kind.AssistantText, $" {content.Trim()} "));
                output.Add(new Segment(Kind.AssistantToken, "</s>"));
            }
        }
    }

    private static string? TemplateText(string folder)
    {
        string jinja = Path.Combine(folder, "chat_template.jinja");
        if (File.Exists(jinja))
        {
            return File.ReadAllText(jinja);
        }

        string config = Path.Combine(folder, "tokenizer_config.json");
        string? text = null;
        if (File.Exists(config))
        {
            TokenizerFile.ReadJson(config, root => text = TemplateText(root));
        }

        return text;
    }

    private static string? TemplateText(JsonField config)
    {
        if (config.Optional("chat_template") is not JsonField template)
        {
            return null;
        }

        // A list has named templates; the one for chats is called default.
        return template.Value.ValueKind != JsonValueKind.Array
            ? template.Text()
            : template.Items()
                .Where(t => t.Required("name").Text() == "default")
                .Select(t => t.Required("template").Text())
                .FirstOrDefault();
    }

    private readonly record struct Segment(Kind Kind, string Text);
}
