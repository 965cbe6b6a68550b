using System.Globalization;
using System.Text.Json;

namespace FlexLLM.Formats;

/// <summary>
/// Typed, range-checked access to the members of one JSON object. A JSON null counts as absent; errors name the file and the
/// field with its path.
/// </summary>
internal readonly struct JsonFields
{
    /// <summary>Most items in a list of names or token ids.</summary>
    public const int ListMax = 4096;

    private readonly string _file;
    private readonly string _prefix;

    /// <summary>Wraps an object; <paramref name="field"/> is its own path, empty for the root of the file.</summary>
    public JsonFields(JsonElement element, string file, string field = "")
    {
        if (element.ValueKind != JsonValueKind.Object)
        {
            throw new InvalidFileException(file, field.Length == 0 ? "JSON" : field, $"must be an object, not {Kind(element)}");
        }

        Element = element;
        _file = file;
        _prefix = field.Length == 0 ? string.Empty : field + ".";
    }

    public JsonElement Element { get; }

    public InvalidFileException Fault(string name, string fault) => new(_file, _prefix + name, fault);

    public InvalidFileException Missing(string name) => Fault(name, "is missing");

    /// <summary>The member, if it is there and not null.</summary>
    public bool TryGet(string name, out JsonElement value) =>
        Element.TryGetProperty(name, out value) && value.ValueKind != JsonValueKind.Null;

    public int Int32(string name, int min, int max) => OptionalInt32(name, min, max) ?? throw Missing(name);

    public int? OptionalInt32(string name, int min, int max) =>
        TryGet(name, out JsonElement value) ? ToInt32(name, value, min, max) : null;

    public double Double(string name, double min, double max) => OptionalDouble(name, min, max) ?? throw Missing(name);

    /// <summary>A finite number within the bounds, both included.</summary>
    public double? OptionalDouble(string name, double min, double max)
    {
        if (!TryGet(name, out JsonElement value))
        {
            return null;
        }

        if (value.ValueKind != JsonValueKind.Number || !value.TryGetDouble(out double number))
        {
            throw Fault(name, $"must be a number, not {Kind(value)}");
        }

        // Written so that NaN would fail; a JSON number beyond the range of a double reads as infinity.
        if (!(number >= min && number <= max))
        {
            throw Fault(name, string.Create(CultureInfo.InvariantCulture, $"is {number}; it must lie between {min} and {max}"));
        }

        return number;
    }

    public bool? OptionalBool(string name)
    {
        if (!TryGet(name, out JsonElement value))
        {
            return null;
        }

        return value.ValueKind switch
        {
            JsonValueKind.True => true,
            JsonValueKind.False => false,
            _ => throw Fault(name, $"must be true or false, not {Kind(value)}"),
        };
    }

    public string String(string name) => OptionalString(name) ?? throw Missing(name);

    public string? OptionalString(string name) => TryGet(name, out JsonElement value) ? ToText(name, value) : null;

    /// <summary>A nested object.</summary>
    public JsonFields? OptionalObject(string name) =>
        TryGet(name, out JsonElement value) ? new JsonFields(value, _file, _prefix + name) : null;

    /// <summary>A list of strings; null when absent.</summary>
    public string[]? OptionalStrings(string name)
    {
        if (!TryGet(name, out JsonElement value))
        {
            return null;
        }

        CheckList(name, value, "a list of strings");
        var texts = new string[value.GetArrayLength()];
        int i = 0;
        foreach (JsonElement item in value.EnumerateArray())
        {
            texts[i] = ToText($"{name}[{i}]", item);
            i++;
        }

        return texts;
    }

    /// <summary>A token id or a list of them, as HF writes eos_token_id; null when absent.</summary>
    public int[]? OptionalTokenIds(string name)
    {
        if (!TryGet(name, out JsonElement value))
        {
            return null;
        }

        if (value.ValueKind == JsonValueKind.Number)
        {
            return [ToInt32(name, value, 0, int.MaxValue)];
        }

        CheckList(name, value, "a token id or a list of them");
        var ids = new int[value.GetArrayLength()];
        int i = 0;
        foreach (JsonElement item in value.EnumerateArray())
        {
            ids[i] = ToInt32($"{name}[{i}]", item, 0, int.MaxValue);
            i++;
        }

        return ids;
    }

    /// <summary>What a value is, in words for an error.</summary>
    public static string Kind(JsonElement value) => value.ValueKind switch
    {
        JsonValueKind.Object => "an object",
        JsonValueKind.Array => "a list",
        JsonValueKind.String => "a string",
        JsonValueKind.Number => "a number",
        JsonValueKind.True or JsonValueKind.False => "true or false",
        _ => "null",
    };

    private int ToInt32(string name, JsonElement value, int min, int max)
    {
        if (value.ValueKind != JsonValueKind.Number || !value.TryGetInt64(out long number))
        {
            string found = value.ValueKind == JsonValueKind.Number ? "this number" : Kind(value);
            throw Fault(name, $"must be an integer, not {found}");
        }

        return number >= min && number <= max
            ? (int)number
            : throw Fault(name, $"is {number}; it must lie between {min} and {max}");
    }

    private string ToText(string name, JsonElement value) =>
        value.ValueKind == JsonValueKind.String ? value.GetString()! : throw Fault(name, $"must be a string, not {Kind(value)}");

    private void CheckList(string name, JsonElement value, string what)
    {
        if (value.ValueKind != JsonValueKind.Array)
        {
            throw Fault(name, $"must be {what}, not {Kind(value)}");
        }

        if (value.GetArrayLength() > ListMax)
        {
            throw Fault(name, $"has {value.GetArrayLength()} items; at most {ListMax} are read");
        }
    }
}
