using System.Globalization;

namespace FlexLLM.Benchmarks;

/// <summary>Reads "--name value" options.</summary>
internal static class CommandLine
{
    /// <summary>The option's value, or null when it is not given.</summary>
    public static string? Text(string[] args, string name)
    {
        int index = Array.IndexOf(args, name);
        return index >= 0 && index + 1 < args.Length ? args[index + 1] : null;
    }

    /// <summary>The option's value, or the default; a value that is no number ends the program with a message.</summary>
    public static int Int(string[] args, string name, int otherwise) => Text(args, name) switch
    {
        null => otherwise,
        string text when int.TryParse(text, CultureInfo.InvariantCulture, out int value) => value,
        string text => throw new ArgumentException($"{name}: '{text}' is not a whole number."),
    };

    public static string Require(string[] args, string name) =>
        Text(args, name) ?? throw new ArgumentException($"{name} is missing.");

    public static bool Has(string[] args, string name) => Array.IndexOf(args, name) >= 0;
}
