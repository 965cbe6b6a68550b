using System.Globalization;

namespace FlexLLM.Benchmarks;

/// <summary>Reads "--name value" options; what it cannot read ends the program with a message.</summary>
internal static class CommandLine
{
    /// <summary>The option's value, or null when it is not given.</summary>
    public static string? Text(string[] args, string name)
    {
        int index = Array.IndexOf(args, name);
        return index < 0 ? null
            : index + 1 < args.Length ? args[index + 1]
            : throw new ArgumentException($"{name} needs a value.");
    }

    /// <summary>The option's value, or the default.</summary>
    public static int Int(string[] args, string name, int otherwise, int min = int.MinValue)
    {
        int value = Text(args, name) is string text ? ParseInt(name, text) : otherwise;
        return value >= min ? value : throw new ArgumentException($"{name}: {value} is less than {min}.");
    }

    /// <summary>The option's value, such as "1,8,16", or the default.</summary>
    public static int[] Ints(string[] args, string name, int[] otherwise, int min)
    {
        int[] values = Text(args, name) is string text ? [.. text.Split(',').Select(part => ParseInt(name, part))] : otherwise;
        return values.All(value => value >= min)
            ? values
            : throw new ArgumentException($"{name}: every value must be at least {min}.");
    }

    /// <summary>The option's value, a positive number, or null when it is not given.</summary>
    public static double? Number(string[] args, string name) => Text(args, name) is string text ? Positive(name, text) : null;

    /// <summary>A value of that option, a positive number.</summary>
    public static double Positive(string name, string text) =>
        double.TryParse(text, NumberStyles.Float, CultureInfo.InvariantCulture, out double value) && value is > 0 and < 1e9
            ? value
            : throw new ArgumentException($"{name}: '{text}' is no positive number.");

    /// <summary>f32 or bf16, or null when the option is not given.</summary>
    public static DType? WeightType(string[] args, string name) => Text(args, name) switch
    {
        null => null,
        "f32" => DType.F32,
        "bf16" => DType.BF16,
        string text => throw new ArgumentException($"{name}: '{text}' is neither f32 nor bf16."),
    };

    public static string Require(string[] args, string name) =>
        Text(args, name) ?? throw new ArgumentException($"{name} is missing.");

    /// <summary>The option's value in bytes, such as "12500000000", "12.5GB" or "11.6GiB", or null when it is not given.</summary>
    public static long? Bytes(string[] args, string name)
    {
        if (Text(args, name) is not string text)
        {
            return null;
        }

        (string Suffix, double Bytes)[] units = [("GiB", 1L << 30), ("MiB", 1L << 20), ("GB", 1e9), ("MB", 1e6), ("", 1)];
        (string suffix, double unit) = units.First(u => text.EndsWith(u.Suffix, StringComparison.OrdinalIgnoreCase));
        bool isNumber = double.TryParse(text[..^suffix.Length], NumberStyles.Float, CultureInfo.InvariantCulture, out double count);
        return isNumber && count * unit is > 0 and < 1e18
            ? (long)(count * unit)
            : throw new ArgumentException($"{name}: '{text}' is no size such as 12500000000, 12.5GB or 11.6GiB.");
    }

    /// <summary>Whether the flag, which has no value, is given; takes it out of the arguments.</summary>
    public static bool TakeFlag(ref string[] args, string name)
    {
        bool given = Has(args, name);
        args = [.. args.Where(argument => argument != name)];
        return given;
    }

    public static bool Has(string[] args, string name) => Array.IndexOf(args, name) >= 0;

    /// <summary>Ends the program where something else than these options, each with a value, is given.</summary>
    public static void Allow(string[] args, params ReadOnlySpan<string> names)
    {
        for (int i = 0; i < args.Length; i += 2)
        {
            if (!names.Contains(args[i]))
            {
                throw new ArgumentException($"'{args[i]}' is no option of this verb; it takes {string.Join(", ", names)}.");
            }
        }
    }

    private static int ParseInt(string name, string text) => int.TryParse(text, CultureInfo.InvariantCulture, out int value)
        ? value
        : throw new ArgumentException($"{name}: '{text}' is not a whole number.");
}
