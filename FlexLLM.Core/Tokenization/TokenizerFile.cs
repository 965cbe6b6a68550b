using System.Text.Json;

namespace FlexLLM.Tokenization;

/// <summary>
/// Reads tokenizer.json, and what tokenizer_config.json adds to it. A component that is not understood in full is refused by
/// name: ids that are nearly right are worse than none. Truncation and padding sections are not read.
/// </summary>
internal sealed partial class TokenizerFile
{
    /// <summary>One past the largest id that is accepted: several times the largest vocabulary in use.</summary>
    public const int IdsMax = 1 << 21;

    private readonly string _file;
    private readonly List<PreTokenizer> _preTokenizers = [];
    private readonly List<Func<string, bool, string>> _normalizers = [];
    private readonly List<AddedToken> _addedTokens = [];
    private readonly List<int> _prefix = [];
    private readonly List<int> _suffix = [];
    private Dictionary<string, int> _vocabulary = [];
    private string?[] _pieces = [];
    private bool _byteLevel;

    private TokenizerFile(string file)
    {
        _file = file;
    }

    public BpeModel Model { get; private set; } = null!;

    public TokenDecoder Decoder { get; private set; } = null!;

    public IReadOnlyList<AddedToken> AddedTokens => _addedTokens;

    /// <summary>From text, and whether it goes on from earlier text, to normalized text.</summary>
    public IReadOnlyList<Func<string, bool, string>> Normalizers => _normalizers;

    public IReadOnlyList<PreTokenizer> PreTokenizers => _preTokenizers;

    /// <summary>Ids put in front of an encoded text.</summary>
    public IReadOnlyList<int> Prefix => _prefix;

    /// <summary>Ids put behind an encoded text.</summary>
    public IReadOnlyList<int> Suffix => _suffix;

    /// <summary>Piece to id, added tokens included.</summary>
    public IReadOnlyDictionary<string, int> Ids => _vocabulary;

    /// <summary>By id: its piece, or null for an id that no token has.</summary>
    public string?[] Pieces => _pieces;

    public int? BosId { get; private set; }

    public int? EosId { get; private set; }

    /// <summary>Reads a tokenizer.json and the tokenizer_config.json beside it, if any.</summary>
    public static TokenizerFile Read(string file)
    {
        TokenizerFile result = new(file);
        ReadJson(file, result.ReadSections);
        result.BosId = result._prefix is [int only] ? only : null;
        string config = Path.Combine(Path.GetDirectoryName(Path.GetFullPath(file))!, "tokenizer_config.json");
        if (File.Exists(config))
        {
            ReadJson(config, result.ReadConfig);
        }

        return result;
    }

    /// <summary>Hands the root of a JSON file to a reader; what is no JSON becomes a fault of the file.</summary>
    public static void ReadJson(string file, Action<JsonField> read)
    {
        try
        {
            using JsonDocument document = JsonDocument.Parse(File.ReadAllBytes(file));
            read(new JsonField(document.RootElement, file, string.Empty));
        }
        catch (JsonException e)
        {
            throw new InvalidFileException(file, $"line {e.LineNumber + 1}", "not JSON", e);
        }
        catch (InvalidOperationException e)
        {
            // Every kind is checked before a value is taken; what is left is text that is no Unicode.
            throw new InvalidFileException(file, "(a string)", "not valid UTF-8, or an escaped half of a surrogate pair", e);
        }
    }

    private void ReadSections(JsonField root)
    {
        JsonField model = root.Required("model");
        ReadVocabulary(model);
        Dictionary<string, int> modelVocabulary = new(_vocabulary);
        foreach (JsonField token in root.Optional("added_tokens")?.Items() ?? [])
        {
            ReadAddedToken(token);
        }

        _pieces = PiecesById();
        Each(root.Optional("normalizer"), "normalizers", ReadNormalizer);
        Each(root.Optional("pre_tokenizer"), "pretokenizers", ReadPreTokenizer);
        Each(root.Optional("post_processor"), "processors", ReadPostProcessor);
        Decoder = ReadDecoders(root.Required("decoder"));
        Model = ReadModel(model, modelVocabulary);
    }

    /// <summary>Reads a component, or the components of a Sequence in order.</summary>
    private static void Each(JsonField? component, string listName, Action<JsonField, string> read)
    {
        if (component is not JsonField field)
        {
            return;
        }

        string type = field.Type();
        if (type != "Sequence")
        {
            read(field, type);
            return;
        }

        foreach (JsonField item in field.Required(listName).Items())
        {
            Each(item, listName, read);
        }
    }

    private void ReadVocabulary(JsonField model)
    {
        if (model.Optional("type")?.Text() is string type && type != "BPE")
        {
            throw model.Unknown(type, "BPE");
        }

        JsonField vocabulary = model.Required("vocab");
        vocabulary.Expect(JsonValueKind.Object);
        _vocabulary = new Dictionary<string, int>(vocabulary.Value.GetPropertyCount());
        foreach (JsonProperty entry in vocabulary.Value.EnumerateObject())
        {
            string piece = entry.Name;
            if (entry.Value.ValueKind != JsonValueKind.Number || !entry.Value.TryGetInt32(out int id) || id is < 0 or >= IdsMax)
            {
                throw vocabulary.Fault($"the id of '{piece}' is not an integer within 0 to {IdsMax - 1}");
            }

            if (!_vocabulary.TryAdd(piece, id))
            {
                throw vocabulary.Fault($"the piece '{piece}' stands twice");
            }
        }

        if (_vocabulary.Count == 0)
        {
            throw vocabulary.Fault("is empty");
        }
    }

    private void ReadAddedToken(JsonField field)
    {
        AddedToken token = new(
            IdOf(field.Required("id")),
            field.Required("content").Text(),
            field.Flag("single_word", false),
            field.Flag("lstrip", false),
            field.Flag("rstrip", false),
            field.Flag("normalized", false),
            field.Flag("special", false));
        if (token.Content.Length == 0)
        {
            throw field.Fault("content is empty");
        }

        if (!_vocabulary.TryAdd(token.Content, token.Id) && _vocabulary[token.Content] != token.Id)
        {
            throw field.Fault($"'{token.Content}' has id {token.Id} here and {_vocabulary[token.Content]} before");
        }

        if (_addedTokens.Exists(t => t.Content == token.Content))
        {
            throw field.Fault($"'{token.Content}' stands twice");
        }

        _addedTokens.Add(token);
    }

    private string?[] PiecesById()
    {
        string?[] pieces = new string?[_vocabulary.Values.Max() + 1];
        foreach ((string piece, int id) in _vocabulary)
        {
            if (pieces[id] is string other)
            {
                throw new InvalidFileException(_file, "model.vocab", $"'{other}' and '{piece}' have the same id {id}");
            }

            pieces[id] = piece;
        }

        return pieces;
    }

    private static int IdOf(JsonField field)
    {
        int id = field.Integer();
        return id is >= 0 and < IdsMax ? id : throw field.Fault($"the id {id} is not within 0 to {IdsMax - 1}");
    }

    private void ReadNormalizer(JsonField field, string type)
    {
        switch (type)
        {
            case "NFC":
                _normalizers.Add((text, _) => UnicodeComposition.Compose(text));
                break;
            case "NFD":
                _normalizers.Add((text, _) => UnicodeComposition.Decompose(text));
                break;
            case "Prepend":
                string prefix = field.Required("prepend").Text();
                _normalizers.Add((text, continued) => continued || text.Length == 0 ? text : prefix + text);
                break;
            case "Replace":
                (string from, string to) = ReadReplacement(field);
                _normalizers.Add((text, _) => text.Replace(from, to, StringComparison.Ordinal));
                break;
            default:
                throw field.Unknown(type, "NFC, NFD, Prepend, Replace, Sequence");
        }
    }

    private static (string From, string To) ReadReplacement(JsonField field)
    {
        JsonField pattern = field.Required("pattern");
        string from = pattern.Optional("String")?.Text() ?? throw pattern.Fault("only a String pattern is supported");
        return from.Length > 0 ? (from, field.Required("content").Text()) : throw pattern.Fault("is empty");
    }

    private void ReadPreTokenizer(JsonField field, string type)
    {
        if (_byteLevel)
        {
            throw field.Fault($"'{type}' after ByteLevel is not supported");
        }

        switch (type)
        {
            case "ByteLevel":
                _byteLevel = true;
                if (field.Flag("add_prefix_space", true))
                {
                    _preTokenizers.Add(new BlankPrefix());
                }

                if (field.Flag("use_regex", true))
                {
                    _preTokenizers.Add(new PatternSplit(WordPattern.Gpt2));
                }

                break;
            case "Split":
                _preTokenizers.Add(ReadSplit(field));
                break;
            case "Digits":
                _preTokenizers.Add(new DigitSplit(field.Flag("individual_digits", false)));
                break;
            case "Metaspace":
                _preTokenizers.Add(new Metaspace(ReadMark(field), ReadScheme(field), field.Flag("split", true)));
                break;
            default:
                throw field.Unknown(type, "ByteLevel, Split, Digits, Metaspace, Sequence");
        }
    }

    private static PatternSplit ReadSplit(JsonField field)
    {
        // Each known expression matches all of a text, so keeping the matches and isolating them is the same.
        bool invert = field.Flag("invert", false);
        string behavior = field.Required("behavior").Text();
        if (behavior != "Isolated" && !(behavior == "Removed" && invert))
        {
            throw field.Fault($"the behavior '{behavior}' is not supported; known are Isolated, and Removed with invert");
        }

        JsonField pattern = field.Required("pattern");
        string expression = pattern.Optional("Regex")?.Text() ?? throw pattern.Fault("only a Regex pattern is supported");
        return new PatternSplit(WordPattern.Recognize(expression) ?? throw pattern.Fault(
            $"the expression '{expression}' is not supported; known are those of GPT-2, Llama 3 and Qwen"));
    }

    private static char ReadMark(JsonField field)
    {
        string mark = field.Required("replacement").Text();
        return mark.Length == 1 ? mark[0] : throw field.Fault("replacement is not one character of the basic plane");
    }

    private static Metaspace.Prepend ReadScheme(JsonField field)
    {
        string scheme = field.Optional("prepend_scheme")?.Text()
            ?? (field.Flag("add_prefix_space", true) ? "always" : "never");
        return scheme switch
        {
            "first" => Metaspace.Prepend.First,
            "always" => Metaspace.Prepend.Always,
            "never" => Metaspace.Prepend.Never,
            _ => throw field.Fault($"the prepend_scheme '{scheme}' is not supported; known are first, always, never"),
        };
    }

    private void ReadPostProcessor(JsonField field, string type)
    {
        if (type == "ByteLevel")
        {
            return; // Concerns offsets only.
        }

        if (type != "TemplateProcessing")
        {
            throw field.Unknown(type, "ByteLevel, TemplateProcessing, Sequence");
        }

        List<int> before = [];
        List<int> after = [];
        bool passedText = false;
        foreach (JsonField part in field.Required("single").Items())
        {
            if (part.Optional("SpecialToken") is not JsonField special)
            {
                if (part.Required("Sequence").Required("id").Text() != "A" || passedText)
                {
                    throw part.Fault("a template for one text has the sequence A once");
                }

                passedText = true;
                continue;
            }

            JsonField token = field.Required("special_tokens").Required(special.Required("id").Text());
            foreach (JsonField id in token.Required("ids").Items())
            {
                int value = IdOf(id);
                bool known = value < _pieces.Length && _pieces[value] is not null;
                (passedText ? after : before).Add(known ? value : throw id.Fault($"no token has the id {value}"));
            }
        }

        if (!passedText)
        {
            throw field.Required("single").Fault("lacks the sequence A");
        }

        _prefix.InsertRange(0, before);
        _suffix.AddRange(after);
    }

    private TokenDecoder ReadDecoders(JsonField root)
    {
        TokenDecoder decoder = new();
        bool bytes = false;
        bool fused = false;
        Each(root, "decoders", (field, type) =>
        {
            // The order in which published files have them; another order means something else.
            if ((bytes && type is "Replace" or "Metaspace" or "ByteLevel" or "ByteFallback")
                || (fused && type != "Strip") || (type == "Strip" && (!fused || decoder.StripMax > 0)))
            {
                throw field.Fault($"'{type}' is not supported at this place");
            }

            bytes |= type is "ByteLevel" or "ByteFallback";
            fused |= type is "Fuse" or "ByteLevel";
            decoder = type switch
            {
                "ByteLevel" => decoder with { ByteLevel = true },
                "ByteFallback" => decoder with { ByteFallback = true },
                "Replace" => decoder with { Replacements = [.. decoder.Replacements, ReadReplacement(field)] },
                "Metaspace" => decoder with
                {
                    Mark = ReadMark(field),
                    DropsFirstMarks = ReadScheme(field) != Metaspace.Prepend.Never,
                },
                "Strip" => ReadStrip(decoder, field),
                "Fuse" => decoder,
                _ => throw field.Unknown(type, "ByteLevel, ByteFallback, Fuse, Metaspace, Replace, Strip, Sequence"),
            };
        });
        if (decoder.ByteLevel != _byteLevel)
        {
            throw root.Fault("ByteLevel must be among the pre-tokenizers and among the decoders, or in neither");
        }

        return decoder;
    }

    private static TokenDecoder ReadStrip(TokenDecoder decoder, JsonField field)
    {
        string content = field.Required("content").Text();
        int start = field.Required("start").Integer();
        int stop = field.Required("stop").Integer();
        return content.Length == 1 && start >= 0 && stop == 0
            ? decoder with { StripChar = content[0], StripMax = start }
            : throw field.Fault("only one character of the basic plane, taken off the start, is supported");
    }

    private void ReadConfig(JsonField root)
    {
        BosId = NamedToken(root, "bos_token") ?? BosId;
        EosId = NamedToken(root, "eos_token") ?? EosId;
        if (root.Optional("add_bos_token") is JsonField addBos && BosId is int bos)
        {
            _prefix.Remove(bos);
            _prefix.InsertRange(0, addBos.Flag() ? [bos] : []);
        }

        if (root.Optional("add_eos_token") is JsonField addEos && EosId is int eos)
        {
            _suffix.Remove(eos);
            _suffix.AddRange(addEos.Flag() ? [eos] : []);
        }
    }

    private int? NamedToken(JsonField root, string name)
    {
        if (root.Optional(name) is not JsonField field)
        {
            return null;
        }

        string token = field.Value.ValueKind == JsonValueKind.Object ? field.Required("content").Text() : field.Text();
        return _vocabulary.TryGetValue(token, out int id) ? id : throw field.Fault($"the tokenizer has no token '{token}'");
    }
}
