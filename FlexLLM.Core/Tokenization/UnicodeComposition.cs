using System.Collections;
using System.IO.Compression;
using System.Runtime.InteropServices;
using System.Text;

namespace FlexLLM.Tokenization;

/// <summary>
/// Unicode normalization forms C and D (UAX #15). string.Normalize does nothing outside ASCII in programs that run with
/// InvariantGlobalization, as containers do, and the ids of a text must not depend on that switch.
/// </summary>
internal static partial class UnicodeComposition
{
    // Below these no character changes, reorders or combines.
    private const char FirstComposing = '\u0300';
    private const char FirstDecomposing = '\u00C0';

    private const int HangulBase = 0xAC00;
    private const int LeadBase = 0x1100;
    private const int VowelBase = 0x1161;
    private const int TrailBase = 0x11A7;
    private const int LeadCount = 19;
    private const int VowelCount = 21;
    private const int TrailCount = 28;
    private const int HangulCount = LeadCount * VowelCount * TrailCount;

    // Every code point with an entry in the tables lies below this.
    private const int TableEnd = 0x30000;

    /// <summary>Form C of a well-formed text; the same object where nothing changes.</summary>
    public static string Compose(string text)
    {
        if (text.AsSpan().IndexOfAnyExceptInRange('\0', (char)(FirstComposing - 1)) < 0 || IsComposed(text))
        {
            return text;
        }

        List<int> runes = DecomposeRunes(text);
        ComposeRunes(runes);
        return TextOf(runes);
    }

    /// <summary>Form D of a well-formed text; the same object where nothing can change.</summary>
    public static string Decompose(string text) =>
        text.AsSpan().IndexOfAnyExceptInRange('\0', (char)(FirstDecomposing - 1)) < 0 ? text : TextOf(DecomposeRunes(text));

    private static bool IsComposed(string text)
    {
        foreach (Rune rune in text.EnumerateRunes())
        {
            if (rune.Value < TableEnd && Tables.MayChange[rune.Value])
            {
                return false;
            }
        }

        return true;
    }

    private static List<int> DecomposeRunes(string text)
    {
        List<int> runes = new(text.Length + 16);
        foreach (Rune rune in text.EnumerateRunes())
        {
            AppendDecomposed(rune.Value, runes);
        }

        Reorder(runes);
        return runes;
    }

    private static void AppendDecomposed(int rune, List<int> runes)
    {
        int hangul = rune - HangulBase;
        if (hangul is >= 0 and < HangulCount)
        {
            runes.Add(LeadBase + (hangul / (VowelCount * TrailCount)));
            runes.Add(VowelBase + (hangul / TrailCount % VowelCount));
            if (hangul % TrailCount != 0)
            {
                runes.Add(TrailBase + (hangul % TrailCount));
            }
        }
        else if (Tables.Decompositions.TryGetValue(rune, out (int First, int Second) parts))
        {
            AppendDecomposed(parts.First, runes);
            if (parts.Second >= 0)
            {
                AppendDecomposed(parts.Second, runes);
            }
        }
        else
        {
            runes.Add(rune);
        }
    }

    /// <summary>Sorts each run of marks by combining class, equal classes in place. n log n for a run of any length.</summary>
    private static void Reorder(List<int> runes)
    {
        List<ulong> keys = [];
        for (int start = 0; start < runes.Count; start++)
        {
            int end = start;
            keys.Clear();
            while (end < runes.Count && ClassOf(runes[end]) is int kind and > 0)
            {
                keys.Add(((ulong)kind << 56) | ((ulong)(end - start) << 21) | (uint)runes[end]);
                end++;
            }

            if (keys.Count > 1)
            {
                keys.Sort();
                for (int i = start; i < end; i++)
                {
                    runes[i] = (int)(keys[i - start] & 0x1FFFFF);
                }
            }

            start = end;
        }
    }

    private static void ComposeRunes(List<int> runes)
    {
        int count = 0;
        int starter = -1;
        int lastClass = 0;
        foreach (int rune in CollectionsMarshal.AsSpan(runes))
        {
            int kind = ClassOf(rune);
            if (starter >= 0 && (lastClass == 0 || lastClass < kind) && Pair(runes[starter], rune) is int pair and >= 0)
            {
                runes[starter] = pair;
                continue;
            }

            if (kind == 0)
            {
                starter = count;
            }

            lastClass = kind;
            runes[count++] = rune;
        }

        runes.RemoveRange(count, runes.Count - count);
    }

    /// <summary>The code point that first and second compose to, or -1.</summary>
    private static int Pair(int first, int second)
    {
        if (first - LeadBase is int lead and >= 0 and < LeadCount && second - VowelBase is int vowel and >= 0 and < VowelCount)
        {
            return HangulBase + (((lead * VowelCount) + vowel) * TrailCount);
        }

        if (first - HangulBase is int syllable and >= 0 and < HangulCount && syllable % TrailCount == 0
            && second - TrailBase is int trail and > 0 and < TrailCount)
        {
            return first + trail;
        }

        return Tables.Compositions.GetValueOrDefault((first, second), -1);
    }

    private static int ClassOf(int rune) => Tables.Classes.GetValueOrDefault(rune);

    private static string TextOf(List<int> runes)
    {
        StringBuilder text = new(runes.Count + 16);
        Span<char> units = stackalloc char[2];
        foreach (int rune in runes)
        {
            text.Append(units[..new Rune(rune).EncodeToUtf16(units)]);
        }

        return text.ToString();
    }

    /// <summary>The unpacked tables; built when the first text needs them.</summary>
    private static class Tables
    {
        /// <summary>Combining classes other than 0.</summary>
        public static readonly Dictionary<int, byte> Classes = [];

        /// <summary>One step of canonical decomposition; Second is -1 for a singleton. Hangul is computed instead.</summary>
        public static readonly Dictionary<int, (int First, int Second)> Decompositions = [];

        public static readonly Dictionary<(int First, int Second), int> Compositions = [];

        /// <summary>True where composing may change a text because of this code point. A text without any is in form C.</summary>
        public static readonly BitArray MayChange = new(TableEnd);

        static Tables()
        {
            using MemoryStream packed = new(Convert.FromBase64String(Packed));
            using DeflateStream inflated = new(packed, CompressionMode.Decompress);
            using BinaryReader reader = new(inflated);
            ReadClasses(reader);
            ReadDecompositions(reader);
            MarkVowelsAndTrails();
            MarkPairsThatStartWithASecond();
        }

        private static void MarkVowelsAndTrails()
        {
            for (int i = 0; i < VowelCount; i++)
            {
                MayChange[VowelBase + i] = true;
            }

            for (int i = 1; i < TrailCount; i++)
            {
                MayChange[TrailBase + i] = true;
            }
        }

        // What composes with the character before may also be the start of a pair's decomposition.
        private static void MarkPairsThatStartWithASecond()
        {
            foreach (int rune in Decompositions.Keys)
            {
                int first = rune;
                while (Decompositions.TryGetValue(first, out (int First, int Second) parts))
                {
                    first = parts.First;
                }

                MayChange[rune] |= MayChange[first];
            }
        }

        private static void ReadClasses(BinaryReader reader)
        {
            int end = 0;
            for (int runs = reader.Read7BitEncodedInt(); runs > 0; runs--)
            {
                int start = end + reader.Read7BitEncodedInt();
                end = start + reader.Read7BitEncodedInt();
                byte kind = (byte)reader.Read7BitEncodedInt();
                for (int rune = start; rune <= end; rune++)
                {
                    Classes.Add(rune, kind);
                    MayChange[rune] = true;
                }
            }
        }

        private static void ReadDecompositions(BinaryReader reader)
        {
            int rune = 0;
            int first = 0;
            int second = 0;
            for (int entries = reader.Read7BitEncodedInt(); entries > 0; entries--)
            {
                rune += reader.Read7BitEncodedInt();
                first += ReadSigned(reader);
                int kind = reader.Read7BitEncodedInt();
                second += kind == 0 ? 0 : ReadSigned(reader);
                Decompositions.Add(rune, (first, kind == 0 ? -1 : second));
                if (kind == 2)
                {
                    Compositions.Add((first, second), rune);
                    MayChange[second] = true;
                }
                else
                {
                    MayChange[rune] = true;
                }
            }
        }

        private static int ReadSigned(BinaryReader reader)
        {
            int value = reader.Read7BitEncodedInt();
            return (value >> 1) ^ -(value & 1);
        }
    }
}
