using System.Text.RegularExpressions;

namespace FlexLLM.Tests.Repository;

/// <summary>A C# file of the repository: its path from the root, with slashes, and its text.</summary>
internal sealed record SourceFile(string Path, string Text);

/// <summary>Reads sources as text: enough of the language to tell code from comments and strings.</summary>
internal static partial class SourceText
{
    /// <summary>The files that a folder of the repository holds in any depth, build outputs left out, by ordinal path.</summary>
    public static List<SourceFile> Files(string folder, string pattern = "*.cs")
    {
        string root = SharedData.RepositoryRoot;
        return
        [
            .. Directory.EnumerateFiles(Path.Combine(root, folder), pattern, SearchOption.AllDirectories)
                .Select(path => Path.GetRelativePath(root, path).Replace('\\', '/'))
                .Where(path => !Outputs().IsMatch(path))
                .Order(StringComparer.Ordinal)
                .Select(path => new SourceFile(path, File.ReadAllText(Path.Combine(root, path)))),
        ];
    }

    /// <summary>
    /// The text with comments and literals blanked; what an interpolated string has between braces stays, as it is code.
    /// A string inside such a hole ends the hole here.
    /// </summary>
    public static string CodeOnly(string text) => NotCode().Replace(text, match => match.Value.StartsWith('$')
        ? string.Join(' ', Holes().Matches(match.Value).Select(hole => hole.Groups[1].Value))
        : " ");

    // Build outputs, and what tools keep in folders with a dot; .ci is ours.
    [GeneratedRegex(@"(^|/)(bin|obj|artifacts|TestResults|BenchmarkDotNet\.Artifacts|\.(?!ci/)[^/]*)/")]
    private static partial Regex Outputs();

    // In this order: comments, raw strings, verbatim strings, strings, characters.
    [GeneratedRegex("""
        //[^\n]*|/\*[\s\S]*?\*/|\$*("{3,})[\s\S]*?\1|(?:@\$?|\$@)"(?:[^"]|"")*"|\$?"(?:\\.|[^"\\\n])*"|'(?:\\.[^'\n]*|[^'\\\n])'
        """)]
    private static partial Regex NotCode();

    [GeneratedRegex("""(?<!\{)\{(?!\{)([^{}"]*)""")]
    private static partial Regex Holes();
}
