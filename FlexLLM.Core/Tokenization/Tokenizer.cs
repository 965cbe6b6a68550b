using System.Text;
using FlexLLM.Tokenization;

namespace FlexLLM;

/// <summary>
/// Turns text into token ids and back, as the tokenizer.json of a HuggingFace model folder says. Reads BPE tokenizers,
/// byte-level (GPT-2, Llama 3, Qwen, SmolLM) and SentencePiece-style with bytes as fallback (Llama 2, Mistral). Immutable to
/// its callers; safe for concurrent use.
/// </summary>
public sealed class Tokenizer
{
    private readonly TokenizerFile _file;
    private readonly AddedTokens _givenTokens;
    private readonly AddedTokens _normalizedTokens;
    private readonly bool[] _special;
    private readonly DecodedPiece?[] _decoded;

    private Tokenizer(TokenizerFile file)
    {
        _file = file;
        _special = new bool[file.Pieces.Length];
        _decoded = new DecodedPiece?[file.Pieces.Length];
        foreach (AddedToken token in file.AddedTokens)
        {
            _special[token.Id] = token.Special;
        }

        _givenTokens = new AddedTokens(file.AddedTokens.Where(t => !t.Normalized));
        _normalizedTokens = new AddedTokens(file.AddedTokens
            .Where(t => t.Normalized)
            .Select(t => t with { Content = Normalize(t.Content, continued: false) })
            .Where(t => t.Content.Length > 0));
    }

    /// <summary>One more than the largest id, added tokens included. A model may have more logits than that.</summary>
    public int VocabularySize => _file.Pieces.Length;

    /// <summary>
    /// Id of the token that begins a text: bos_token of tokenizer_config.json, else the one that encoding puts in front.
    /// </summary>
    public int? BosId => _file.BosId;

    /// <summary>Id of the token that ends a text: eos_token of tokenizer_config.json, null without that file.</summary>
    public int? EosId => _file.EosId;

    internal TokenDecoder Decoder => _file.Decoder;

    /// <summary>Reads a tokenizer.json, and bos_token, eos_token, add_bos_token and add_eos_token of the
    /// tokenizer_config.json beside it, if there is one.</summary>
    /// <param name="tokenizerJsonOrFolder">The file, or the folder that holds it.</param>
    /// <exception cref="InvalidFileException">The file is malformed, or needs a component that is not supported.</exception>
    public static Tokenizer Load(string tokenizerJsonOrFolder)
    {
        ArgumentException.ThrowIfNullOrEmpty(tokenizerJsonOrFolder);
        string file = Directory.Exists(tokenizerJsonOrFolder)
            ? Path.Combine(tokenizerJsonOrFolder, "tokenizer.json")
            : tokenizerJsonOrFolder;
        return File.Exists(file)
            ? new Tokenizer(TokenizerFile.Read(file))
            : throw new InvalidFileException(file, "file", "does not exist");
    }

    /// <summary>Token ids of a text. Special tokens spelled out in it become those tokens.</summary>
    /// <param name="text">Any text; a lone surrogate counts as U+FFFD.</param>
    /// <param name="addSpecialTokens">Put in front and behind what the file says, such as the beginning-of-text token.</param>
    public int[] Encode(string text, bool addSpecialTokens = true) => Encode(text, addSpecialTokens, parseSpecialTokens: true);

    /// <summary>Token ids of a text, with a choice of what special tokens spelled out in it mean.</summary>
    /// <param name="text">Any text; a lone surrogate counts as U+FFFD.</param>
    /// <param name="addSpecialTokens">Put in front and behind what the file says, such as the beginning-of-text token.</param>
    /// <param name="parseSpecialTokens">
    /// False for text from outside: the spelling of a special token is then plain text and never gives that token.
    /// </param>
    public int[] Encode(string text, bool addSpecialTokens, bool parseSpecialTokens)
    {
        ArgumentNullException.ThrowIfNull(text);
        List<int> ids = new((text.Length / 3) + 4);
        if (addSpecialTokens)
        {
            ids.AddRange(_file.Prefix);
        }

        EncodeTo(ids, text, parseSpecialTokens, TextPlace.Start);
        if (addSpecialTokens)
        {
            ids.AddRange(_file.Suffix);
        }

        return [.. ids];
    }

    /// <summary>
    /// Text of a sequence of ids. Bytes that form no character give U+FFFD; unlike HuggingFace's ByteFallback decoder, a
    /// wrong byte token leaves the characters around it whole, as SentencePiece does.
    /// </summary>
    /// <param name="ids">Ids of tokens.</param>
    /// <param name="skipSpecialTokens">Leave out special tokens.</param>
    /// <exception cref="ArgumentOutOfRangeException">No token has one of the ids.</exception>
    public string Decode(ReadOnlySpan<int> ids, bool skipSpecialTokens = false)
    {
        StringBuilder text = new(ids.Length * 4);
        StreamingDecoder decoder = new(this, skipSpecialTokens);
        foreach (int id in ids)
        {
            decoder.AppendTo(text, id);
        }

        decoder.FlushTo(text);
        return text.ToString();
    }

    /// <summary>Id of a token by its spelling in the file (byte-level pieces in their own alphabet), or null.</summary>
    public int? IdOf(string token) => _file.Ids.TryGetValue(token, out int id) ? id : null;

    /// <summary>True when a token has the id. Models often have more rows than their tokenizer has tokens.</summary>
    public bool Contains(int id) => (uint)id < (uint)_file.Pieces.Length && _file.Pieces[id] is not null;

    /// <summary>A token's spelling in the file.</summary>
    /// <exception cref="ArgumentOutOfRangeException">No token has the id.</exception>
    public string TokenOf(int id) => (uint)id < (uint)_file.Pieces.Length && _file.Pieces[id] is string piece
        ? piece
        : throw new ArgumentOutOfRangeException(nameof(id), id, "No token has this id.");

    /// <summary>True for a special token, such as one that ends a text or a turn; false for an id that no token has.</summary>
    public bool IsSpecial(int id) => (uint)id < (uint)_special.Length && _special[id];

    /// <summary>Ids of a text that goes on from one encoded before it: nothing is put in front of it or behind it.</summary>
    internal int[] EncodeContinuation(string text)
    {
        List<int> ids = [];
        EncodeTo(ids, text, parseSpecialTokens: true, TextPlace.Continued);
        return [.. ids];
    }

    /// <summary>Appends the ids of a text without what the post-processor adds.</summary>
    internal void EncodeTo(List<int> ids, string text, bool parseSpecialTokens, TextPlace place)
    {
        string whole = WellFormed(text);
        foreach (TextPart given in _givenTokens.Split(whole, parseSpecialTokens))
        {
            if (given.Token is not null)
            {
                ids.Add(given.Token.Id);
                continue;
            }

            TextPlace givenPlace = given.Start == 0 ? place : TextPlace.Inside;
            string normalized = Normalize(whole[given.Start..given.End], givenPlace == TextPlace.Continued);
            foreach (TextPart part in _normalizedTokens.Split(normalized, parseSpecialTokens))
            {
                if (part.Token is not null)
                {
                    ids.Add(part.Token.Id);
                    continue;
                }

                TextPlace partPlace = part.Start == 0 ? givenPlace : TextPlace.Inside;
                EncodeWords(ids, normalized.AsSpan(part.Start, part.End - part.Start), 0, partPlace);
            }
        }
    }

    internal DecodedPiece DecodedPieceOf(int id, bool first)
    {
        string piece = TokenOf(id);
        return first && Decoder.DropsFirstMarks
            ? Decoder.Decode(piece, first: true)
            : _decoded[id] ??= Decoder.Decode(piece, first: false);
    }

    private void EncodeWords(List<int> ids, ReadOnlySpan<char> text, int step, TextPlace place)
    {
        if (step == _file.PreTokenizers.Count)
        {
            _file.Model.Encode(text, ids);
            return;
        }

        PreTokenizer splitter = _file.PreTokenizers[step];
        text = splitter.Rewrite(text, place);
        for (int start = 0; start < text.Length;)
        {
            int end = splitter.NextEnd(text, start);
            EncodeWords(ids, text[start..end], step + 1, start == 0 ? place : TextPlace.Inside);
            start = end;
        }
    }

    private string Normalize(string text, bool continued)
    {
        foreach (Func<string, bool, string> normalizer in _file.Normalizers)
        {
            text = normalizer(text, continued);
        }

        return text;
    }

    /// <summary>The text with lone surrogates replaced; the same object in the usual case.</summary>
    internal static string WellFormed(string text)
    {
        if (text.AsSpan().IndexOfAnyInRange('\uD800', '\uDFFF') < 0)
        {
            return text;
        }

        StringBuilder result = new(text.Length);
        foreach (Rune rune in text.EnumerateRunes())
        {
            result.Append(rune);
        }

        return result.ToString();
    }
}
