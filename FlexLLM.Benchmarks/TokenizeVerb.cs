using System.Diagnostics;
using System.Globalization;
using System.Text;

namespace FlexLLM.Benchmarks;

/// <summary>`tokenize`: loads a tokenizer and measures encoding and decoding of a text file.</summary>
internal static class TokenizeVerb
{
    private const int Repetitions = 5;

    public static string Usage => "--tokenizer FOLDER_OR_FILE --text FILE";

    public static int Run(string[] args)
    {
        CommandLine.Allow(args, "--tokenizer", "--text");
        string path = CommandLine.Require(args, "--tokenizer");
        string file = CommandLine.Require(args, "--text");
        if (!File.Exists(file))
        {
            throw new ArgumentException($"--text: {file} does not exist.");
        }

        string text = File.ReadAllText(file);
        double megabytes = Encoding.UTF8.GetByteCount(text) / 1e6;
        Tokenizer.Load(path).Encode(text); // Compiles the code; the measured tokenizer starts with an empty word cache.
        long begun = Stopwatch.GetTimestamp();
        Tokenizer tokenizer = Tokenizer.Load(path);
        double load = Stopwatch.GetElapsedTime(begun).TotalMilliseconds;
        int[] ids = [];
        double first = Seconds(() => ids = tokenizer.Encode(text, addSpecialTokens: false));
        double again = Enumerable.Range(0, Repetitions).Min(_ => Seconds(() => tokenizer.Encode(text, addSpecialTokens: false)));
        double decode = Enumerable.Range(0, Repetitions).Min(_ => Seconds(() => tokenizer.Decode(ids)));
        Console.WriteLine(string.Create(
            CultureInfo.InvariantCulture,
            $"{ids.Length} tokens of {megabytes:0.00} MB; load {load:0} ms, encode {megabytes / first:0.0} MB/s the first time and " +
            $"{megabytes / again:0.0} MB/s again, decode {megabytes / decode:0.0} MB/s"));
        return 0;
    }

    private static double Seconds(Action action)
    {
        long begun = Stopwatch.GetTimestamp();
        action();
        return Stopwatch.GetElapsedTime(begun).TotalSeconds;
    }
}
