using System.Text.RegularExpressions;

namespace FlexLLM.Tests.Repository;

/// <summary>
/// Finds uses of one folder of FlexLLM.Core by another that the design forbids. It reads sources as text: public types share one
/// namespace and inlined constants leave no trace in the assembly. A name after a dot is a member or a nested type, whose owner
/// was judged already. Types are top level where their declaration starts in column 0, as `dotnet format` keeps it.
/// </summary>
internal static partial class LayerRules
{
    /// <summary>Every folder, lowest first: a folder may use those before it.</summary>
    public static readonly string[] Order =
    [
        "Primitives", "Scheduling", "Formats", "Tokenization", "Backends", "Graph", "Models", "KvCache", "Adapters", "Execution",
        "Finetuning", "Engine",
    ];

    /// <summary>The folders that use Primitives and nothing else.</summary>
    public static readonly string[] OnPrimitivesOnly = ["Scheduling", "Formats", "Tokenization", "Backends", "Graph"];

    /// <summary>One line for each name of a forbidden folder in each file, and for each file outside of the table.</summary>
    public static List<string> Violations(IReadOnlyList<SourceFile> files)
    {
        List<Source> sources = [.. files.Select(Source.Of)];
        ILookup<string, Declaration> types = sources.SelectMany(source => source.Types).ToLookup(type => type.Name);
        return [.. sources.SelectMany(source => Violations(source, types)).Order(StringComparer.Ordinal)];
    }

    private static IEnumerable<string> Violations(Source source, ILookup<string, Declaration> types)
    {
        if (!Order.Contains(source.Folder))
        {
            return [$"{source.Path}: the table has no folder '{source.Folder}'"];
        }

        IEnumerable<(string Name, string Folder)> namespaces = NamespaceUse().Matches(source.Code)
            .Select(match => (match.Value, match.Groups[1].Value)).Where(used => Order.Contains(used.Item2));
        IEnumerable<(string Name, string Folder)> names = Identifier().Matches(source.Code)
            .Select(match => match.Groups[1].Value).Distinct()
            .Where(name => !source.NestedTypes.Contains(name))
            .SelectMany(name => Resolve(name, source, types).Select(type => (name, type.Folder)));
        return namespaces.Concat(names).Distinct().Where(used => !Allows(source.Folder, used.Folder))
            .Select(used => $"{source.Path}: {source.Folder} may not use {used.Folder}, but names {used.Name}");
    }

    private static bool Allows(string user, string used) =>
        user == used || used == Order[0]
        || (!OnPrimitivesOnly.Contains(user) && Array.IndexOf(Order, used) < Array.IndexOf(Order, user));

    // As the compiler does: the file's namespace, then those around it, then all usings together.
    private static IEnumerable<Declaration> Resolve(string name, Source source, ILookup<string, Declaration> types)
    {
        for (string scope = source.Namespace; scope.Length > 0; scope = scope[..Math.Max(scope.LastIndexOf('.'), 0)])
        {
            Declaration[] inScope = [.. types[name].Where(type => type.Namespace == scope)];
            if (inScope.Length > 0)
            {
                return inScope;
            }
        }

        return types[name].Where(type => source.Usings.Contains(type.Namespace));
    }

    [GeneratedRegex(@"\bFlexLLM\.(\w+)(?:\.\w+)*")]
    private static partial Regex NamespaceUse();

    [GeneratedRegex(@"(?:\bFlexLLM\.|(?<![\w.]))([A-Z]\w*)")]
    private static partial Regex Identifier();

    private sealed record Declaration(string Name, string Namespace, string Folder);

    private sealed partial record Source(
        string Path,
        string Folder,
        string Namespace,
        string Code,
        HashSet<string> Usings,
        List<Declaration> Types,
        HashSet<string> NestedTypes)
    {
        public static Source Of(SourceFile file)
        {
            string code = SourceText.CodeOnly(file.Text);
            string folder = file.Path.Split('/')[1];
            string space = NamespaceLine().Match(code).Groups[1].Value;
            return new Source(
                file.Path,
                folder,
                space,
                code,
                [.. UsingLine().Matches(code).Select(match => match.Groups[1].Value)],
                [.. TopLevelType().Matches(code).Select(match => new Declaration(match.Groups[1].Value, space, folder))],
                [.. NestedType().Matches(code).Select(match => match.Groups[1].Value)]);
        }

        [GeneratedRegex(@"^namespace ([\w.]+)", RegexOptions.Multiline)]
        private static partial Regex NamespaceLine();

        [GeneratedRegex(@"^using ([\w.]+);", RegexOptions.Multiline)]
        private static partial Regex UsingLine();

        [GeneratedRegex(TopLevel + Kind, RegexOptions.Multiline)]
        private static partial Regex TopLevelType();

        [GeneratedRegex(Nested + Kind, RegexOptions.Multiline)]
        private static partial Regex NestedType();

        private const string TopLevel = @"^(?:[a-z]+ )+?";
        private const string Nested = @"^ +(?:[a-z]+ )*?";
        private const string Kind = @"(?:class|struct|record struct|record|interface|enum|delegate [\w<>\[\]?.]+) (\w+)";
    }
}
