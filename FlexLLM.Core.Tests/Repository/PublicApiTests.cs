using NUnit.Framework;

namespace FlexLLM.Tests.Repository;

/// <summary>Every change of the public surface shows in a diff of PublicApi.approved.txt.</summary>
[TestFixture]
internal sealed class PublicApiTests
{
    private const string Approve = "FLEXLLM_APPROVE";

    private static readonly Type[] Exported = typeof(CoServingEngine).Assembly.GetExportedTypes();

    private static string ApprovedPath =>
        Path.Combine(SharedData.RepositoryRoot, "FlexLLM.Core.Tests", "Repository", "PublicApi.approved.txt");

    [Test]
    public void Core_PublicSurface_IsAsApproved()
    {
        string actual = PublicApi.Print(Exported);
        if (Environment.GetEnvironmentVariable(Approve) == "1")
        {
            File.WriteAllText(ApprovedPath, actual);
        }

        string[] changes = Changes(File.ReadAllText(ApprovedPath).ReplaceLineEndings("\n"), actual);
        string advice = $"If that is meant, run the tests once with {Approve}=1 and commit {Path.GetFileName(ApprovedPath)}.";
        Assert.That(changes, Is.Empty, string.Join('\n', [.. changes, advice]));
    }

    [Test]
    public void Core_PublicTypes_AreInTheRootNamespace() =>
        Assert.That(Exported.Where(type => type.Namespace != "FlexLLM").Select(type => type.FullName), Is.Empty);

    [Test]
    public void Changes_MemberMovedBetweenTypes_ShowBoth() => Assert.That(
        Changes("class A\n    int X\n\nclass B\n    int Y\n\n", "class A\n\nclass B\n    int X\n    int Y\n\n"),
        Is.EqualTo(new[] { "- class A | int X", "+ class B | int X" }));

    [Test]
    public void Print_TypeOfEachKind_GivesLinesInOrder() => Assert.That(
        PublicApi.Print([typeof(Shape), typeof(Size), typeof(Kind)]), Is.EqualTo("""
            enum FlexLLM.Tests.Repository.PublicApiTests.Kind : byte
                0 Round
                4 Square

            abstract class FlexLLM.Tests.Repository.PublicApiTests.Shape : Attribute, IDisposable
                abstract void Dispose()
                const int SidesMax = 8
                override string ToString()
                protected new(int? sides = 3)
                static bool TryParse<T>(T[] text, out PublicApiTests.Shape shape)

            readonly record struct FlexLLM.Tests.Repository.PublicApiTests.Size
                int Width { get; init; }
                new(int Width)
                required string Unit { get; init; }


            """));

    // Lines without the same line under the same type on the other side.
    private static string[] Changes(string approved, string actual)
    {
        List<string> before = WithType(approved);
        List<string> after = WithType(actual);
        return [.. before.Except(after).Select(line => "- " + line), .. after.Except(before).Select(line => "+ " + line)];
    }

    private static List<string> WithType(string text)
    {
        string type = "";
        List<string> lines = [];
        foreach (string line in text.Split('\n', StringSplitOptions.RemoveEmptyEntries))
        {
            bool member = line.StartsWith(' ');
            type = member ? type : line;
            lines.Add(member ? $"{type} | {line.Trim()}" : line);
        }

        return lines;
    }

#pragma warning disable CA1008, CA1028, CA1018, CA1813, CA1710, CA1816, CA1063 // Samples of what can be printed.
    public enum Kind : byte
    {
        Round,
        Square = 4,
    }

    public abstract class Shape : Attribute, IDisposable
    {
        public const int SidesMax = 8;

        protected Shape(int? sides = 3) => Sides = sides;

        internal int? Sides { get; }

        public static bool TryParse<T>(T[] text, out Shape? shape)
        {
            shape = null;
            return text.Length > 0;
        }

        public override string ToString() => $"{Sides}";

        public abstract void Dispose();
    }

    public readonly record struct Size(int Width)
    {
        public required string Unit { get; init; }
    }
#pragma warning restore
}
