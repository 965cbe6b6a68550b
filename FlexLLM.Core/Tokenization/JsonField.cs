using System.Text.Json;

namespace FlexLLM.Tokenization;

/// <summary>A JSON value that knows where it stands, so that every fault names its file and field.</summary>
internal readonly struct JsonField(JsonElement value, string file, string path)
{
    public JsonElement Value => value;

    public string Path => path.Length == 0 ? "(root)" : path;

    public InvalidFileException Fault(string fault) => new(file, Path, fault);

    /// <summary>A member of this object, or null where it is absent or JSON null.</summary>
    public JsonField? Optional(string name)
    {
        Expect(JsonValueKind.Object);
        return value.TryGetProperty(name, out JsonElement member) && member.ValueKind != JsonValueKind.Null
            ? new JsonField(member, file, PathOf(name))
            : null;
    }

    public JsonField Required(string name) =>
        Optional(name) ?? throw new InvalidFileException(file, PathOf(name), "missing");

    /// <summary>The elements of this array.</summary>
    public List<JsonField> Items()
    {
        Expect(JsonValueKind.Array);
        List<JsonField> items = new(value.GetArrayLength());
        foreach (JsonElement item in value.EnumerateArray())
        {
            items.Add(new JsonField(item, file, $"{path}[{items.Count}]"));
        }

        return items;
    }

    public string Text()
    {
        Expect(JsonValueKind.String);
        return value.GetString()!;
    }

    public int Integer() =>
        value.ValueKind == JsonValueKind.Number && value.TryGetInt32(out int number)
            ? number
            : throw Fault("not a 32-bit integer");

    public bool Flag() => value.ValueKind switch
    {
        JsonValueKind.True => true,
        JsonValueKind.False => false,
        _ => throw Fault("neither true nor false"),
    };

    /// <summary>A flag of this object, with the value that absence or null stands for.</summary>
    public bool Flag(string name, bool absent) => Optional(name)?.Flag() ?? absent;

    /// <summary>The member that names what kind of component this object is.</summary>
    public string Type() => Required("type").Text();

    public InvalidFileException Unknown(string type, string known) =>
        new(file, PathOf("type"), $"'{type}' is not supported; known are {known}");

    public void Expect(JsonValueKind kind)
    {
        if (value.ValueKind != kind)
        {
            throw Fault($"is {value.ValueKind}, not {kind}");
        }
    }

    private string PathOf(string name) => path.Length == 0 ? name : $"{path}.{name}";
}
