using System.Buffers;
using System.Collections.Concurrent;
using System.Runtime.InteropServices;
using System.Text;

namespace FlexLLM.Tokenization;

/// <summary>What a BPE model is made of; ids are within [0, <see cref="TokenizerFile.IdsMax"/>).</summary>
internal sealed record BpeParts
{
    /// <summary>Piece to id, without added tokens that the model's own vocabulary lacks.</summary>
    public required Dictionary<string, int> Vocabulary { get; init; }

    /// <summary>Pairs of ids that merge; lower ranks first.</summary>
    public required PairRanks Ranks { get; init; }

    /// <summary>By rank: id of the merged piece.</summary>
    public required int[] MergedIds { get; init; }

    /// <summary>Symbols are bytes in the alphabet of <see cref="ByteAlphabet"/>, else code points.</summary>
    public required bool ByteLevel { get; init; }

    /// <summary>Characters without a piece become pieces &lt;0xHH&gt;, one for each UTF-8 byte.</summary>
    public required bool ByteFallback { get; init; }

    /// <summary>A word that is a piece as it stands is not built by merges.</summary>
    public required bool IgnoreMerges { get; init; }

    /// <summary>Piece for symbols without any other, or null: such symbols are dropped.</summary>
    public required int? UnknownId { get; init; }

    /// <summary>A row of unknown symbols gives one unknown piece.</summary>
    public required bool FuseUnknown { get; init; }
}

/// <summary>
/// Byte-pair encoding of one word: the pair of lowest rank merges first, the leftmost among equals. Takes n log n for a word
/// of n symbols. Safe for concurrent use.
/// </summary>
internal sealed class BpeModel
{
    private const int CachedWordsMax = 1 << 15;
    private const int CachedCharsMax = 48;
    private const int WholePieceBytesMax = 512;
    private const char Mark = '\u2581';
    private const int NoRank = int.MaxValue;
    private const int KeptSymbolsMax = 1 << 13;

    [ThreadStatic]
    private static Workspace? _workspace;

    private readonly BpeParts _parts;
    private readonly Dictionary<string, int>.AlternateLookup<ReadOnlySpan<char>> _pieces;
    private readonly int[] _byteIds = new int[256];
    private readonly Dictionary<int, int> _runeIds = [];
    private readonly int _pieceCharsMax;

    // SentencePiece-style models take a whole text as one word. Where no piece has a mark after another character (and no
    // character is dropped, which could bring two marks together), no merge reaches over the place before a mark: cutting
    // there changes nothing and makes words that can be cached.
    private readonly bool _cutsBeforeMarks;

    // Words in the order they came, until full: what a language uses most comes early.
    private readonly ConcurrentDictionary<string, int[]> _cache = new(StringComparer.Ordinal);
    private readonly ConcurrentDictionary<string, int[]>.AlternateLookup<ReadOnlySpan<char>> _cached;
    private int _cachedWords;

    public BpeModel(BpeParts parts)
    {
        _parts = parts;
        _pieces = parts.Vocabulary.GetAlternateLookup<ReadOnlySpan<char>>();
        _cached = _cache.GetAlternateLookup<ReadOnlySpan<char>>();
        for (int b = 0; b < _byteIds.Length; b++)
        {
            string piece = parts.ByteLevel ? ByteAlphabet.CharOf((byte)b).ToString() : $"<0x{b:X2}>";
            _byteIds[b] = parts.Vocabulary.GetValueOrDefault(piece, -1);
        }

        _cutsBeforeMarks = !parts.ByteLevel && !parts.IgnoreMerges && parts.UnknownId is not null
            && parts.Vocabulary.ContainsKey(Mark.ToString());
        foreach ((string piece, int id) in parts.Vocabulary)
        {
            _cutsBeforeMarks &= CutBeforeMark(piece) == piece.Length;
            _pieceCharsMax = Math.Max(_pieceCharsMax, piece.Length);
            if (Rune.DecodeFromUtf16(piece, out Rune rune, out int units) == OperationStatus.Done && units == piece.Length)
            {
                _runeIds.Add(rune.Value, id);
            }
        }
    }

    /// <summary>Appends the ids of one word of well-formed text.</summary>
    public void Encode(ReadOnlySpan<char> word, List<int> ids)
    {
        while (_cutsBeforeMarks && CutBeforeMark(word) is int cut && cut < word.Length)
        {
            EncodePart(word[..cut], ids);
            word = word[cut..];
        }

        EncodePart(word, ids);
    }

    /// <summary>The first place before a mark and after another character, else the length.</summary>
    private static int CutBeforeMark(ReadOnlySpan<char> text)
    {
        int other = text.IndexOfAnyExcept(Mark);
        int mark = other < 0 ? -1 : text[other..].IndexOf(Mark);
        return mark < 0 ? text.Length : other + mark;
    }

    private void EncodePart(ReadOnlySpan<char> word, List<int> ids)
    {
        if (word.Length > CachedCharsMax)
        {
            EncodeAnew(word, ids);
            return;
        }

        if (!_cached.TryGetValue(word, out int[]? known))
        {
            int before = ids.Count;
            EncodeAnew(word, ids);
            if (Volatile.Read(ref _cachedWords) < CachedWordsMax
                && _cached.TryAdd(word, CollectionsMarshal.AsSpan(ids)[before..].ToArray()))
            {
                Interlocked.Increment(ref _cachedWords);
            }

            return;
        }

        ids.AddRange(known.AsSpan());
    }

    private void EncodeAnew(ReadOnlySpan<char> word, List<int> ids)
    {
        if (_parts.IgnoreMerges && WholePiece(word) is int id and >= 0)
        {
            ids.Add(id);
            return;
        }

        int symbolsMax = Encoding.UTF8.GetByteCount(word);
        Workspace work = _workspace ?? new Workspace(KeptSymbolsMax);
        if (symbolsMax > work.Ids.Length)
        {
            work = new Workspace(symbolsMax);
        }
        else
        {
            _workspace = work;
        }

        work.Count = 0;
        if (_parts.ByteLevel)
        {
            AddByteSymbols(word, work);
        }
        else
        {
            AddRuneSymbols(word, work);
        }

        Merge(work);
        for (int i = 0; i < work.Count; i = work.Next[i])
        {
            ids.Add(work.Ids[i]);
        }
    }

    private int WholePiece(ReadOnlySpan<char> word)
    {
        if (!_parts.ByteLevel)
        {
            return _pieces.TryGetValue(word, out int id) ? id : -1;
        }

        // Longer words are no pieces. A piece of more bytes than this is left to its merges.
        Span<byte> bytes = stackalloc byte[WholePieceBytesMax];
        Span<char> piece = stackalloc char[WholePieceBytesMax];
        if (word.Length > _pieceCharsMax || !Encoding.UTF8.TryGetBytes(word, bytes, out int count))
        {
            return -1;
        }

        for (int i = 0; i < count; i++)
        {
            piece[i] = ByteAlphabet.CharOf(bytes[i]);
        }

        return _pieces.TryGetValue(piece[..count], out int whole) ? whole : -1;
    }

    private void AddByteSymbols(ReadOnlySpan<char> word, Workspace work)
    {
        bool afterUnknown = false;
        Span<byte> bytes = stackalloc byte[4];
        foreach (Rune rune in word.EnumerateRunes())
        {
            foreach (byte b in bytes[..rune.EncodeToUtf8(bytes)])
            {
                afterUnknown = AddSymbol(_byteIds[b], afterUnknown, work);
            }
        }
    }

    private void AddRuneSymbols(ReadOnlySpan<char> word, Workspace work)
    {
        bool afterUnknown = false;
        Span<byte> buffer = stackalloc byte[4];
        foreach (Rune rune in word.EnumerateRunes())
        {
            Span<byte> bytes = buffer[..rune.EncodeToUtf8(buffer)];
            if (!_runeIds.TryGetValue(rune.Value, out int id))
            {
                id = -1;
                if (_parts.ByteFallback && HasAll(bytes))
                {
                    foreach (byte b in bytes)
                    {
                        afterUnknown = AddSymbol(_byteIds[b], afterUnknown, work);
                    }

                    continue;
                }
            }

            afterUnknown = AddSymbol(id, afterUnknown, work);
        }
    }

    private bool HasAll(ReadOnlySpan<byte> bytes)
    {
        foreach (byte b in bytes)
        {
            if (_byteIds[b] < 0)
            {
                return false;
            }
        }

        return true;
    }

    /// <summary>Returns whether the symbol was an unknown one.</summary>
    private bool AddSymbol(int id, bool afterUnknown, Workspace work)
    {
        if (id >= 0)
        {
            work.Ids[work.Count++] = id;
            return false;
        }

        if (_parts.UnknownId is int unknown && !(afterUnknown && _parts.FuseUnknown))
        {
            work.Ids[work.Count++] = unknown;
        }

        return true;
    }

    private void Merge(Workspace work)
    {
        int count = work.Count;
        work.Queue.Clear();
        for (int i = 0; i < count; i++)
        {
            work.Next[i] = i + 1;
            work.Previous[i] = i - 1;
            SetRank(work, i);
        }

        while (work.Queue.TryDequeue(out int left, out long key))
        {
            int rank = (int)(key >> 32);
            if (work.Ranks[left] != rank)
            {
                continue; // The pair changed after it was queued.
            }

            int right = work.Next[left];
            work.Ids[left] = _parts.MergedIds[rank];
            work.Next[left] = work.Next[right];
            work.Ranks[right] = NoRank;
            if (work.Next[left] < count)
            {
                work.Previous[work.Next[left]] = left;
            }

            SetRank(work, left);
            if (work.Previous[left] >= 0)
            {
                SetRank(work, work.Previous[left]);
            }
        }
    }

    private void SetRank(Workspace work, int left)
    {
        int right = work.Next[left];
        int rank = NoRank;
        if (right < work.Count && _parts.Ranks.Find(work.Ids[left], work.Ids[right]) is int found and >= 0)
        {
            rank = found;
            work.Queue.Enqueue(left, ((long)rank << 32) | (uint)left);
        }

        work.Ranks[left] = rank;
    }

    /// <summary>A linked list of symbols in columns, and the pairs that can merge, by rank and place.</summary>
    private sealed class Workspace(int symbolsMax)
    {
        public int[] Ids { get; } = new int[symbolsMax];

        public int[] Next { get; } = new int[symbolsMax];

        public int[] Previous { get; } = new int[symbolsMax];

        /// <summary>Rank of the pair that a symbol forms with the next one.</summary>
        public int[] Ranks { get; } = new int[symbolsMax];

        public PriorityQueue<int, long> Queue { get; } = new();

        public int Count { get; set; }
    }
}
