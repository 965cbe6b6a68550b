using System.IO.Compression;
using System.Text;
using System.Text.Json;
using System.Xml.Linq;
using FlexLLM.Tests.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Repository;

/// <summary>
/// Packs the library as it was built for these tests and uses the package as its users do: from a project elsewhere that knows
/// nothing of this repository. Reads packages from the machine's package folder and asks no server.
/// </summary>
[TestFixture]
[Parallelizable]
internal sealed class PackageTests
{
    private const string Version = "0.1.0-test";

    private static readonly TimeSpan Limit = TimeSpan.FromMinutes(10); // A bound, not a measure: shared machines are slow.

    private readonly TempFolder _folder = new();

    private string Package => Path.Combine(_folder["feed"], $"FlexLLM.Core.{Version}.nupkg");

    [OneTimeSetUp]
    public async Task PackAsync()
    {
        string core = Path.Combine(SharedData.RepositoryRoot, "FlexLLM.Core");
        string[] outputs = ["-o", _folder["feed"], $"-p:NuspecOutputPath={_folder["spec"]}"];
        Finished pack = await Dotnet.RunAsync(
            core, Limit, ["pack", "--no-build", "-c", Configuration, $"-p:PackageVersion={Version}", .. outputs]);
        Assert.That(pack.ExitCode, Is.Zero, pack.Output);
        Assert.That(pack.Output, Does.Not.Contain("warning"));
    }

    [OneTimeTearDown]
    public void Remove() => _folder.Dispose();

    [Test]
    public void Package_Files_AreLibraryDocsAndReadme()
    {
        using ZipArchive zip = ZipFile.OpenRead(Package);
        string[] names = [.. zip.Entries.Select(entry => entry.FullName).Where(name => !IsEnvelope(name))];
        Assert.That(names, Is.EquivalentTo(new[]
        {
            "FlexLLM.Core.nuspec", "README.md", "lib/net10.0/FlexLLM.Core.dll", "lib/net10.0/FlexLLM.Core.xml",
        }));
        using ZipArchive symbols = ZipFile.OpenRead(Path.ChangeExtension(Package, ".snupkg"));
        Assert.That(symbols.Entries.Select(entry => entry.FullName), Does.Contain("lib/net10.0/FlexLLM.Core.pdb"));
    }

    [Test]
    public void Package_Metadata_NamesLicenseReadmeAndDependencies()
    {
        using ZipArchive zip = ZipFile.OpenRead(Package);
        using Stream stream = zip.GetEntry("FlexLLM.Core.nuspec")!.Open();
        XElement metadata = XDocument.Load(stream).Root!.Elements().Single();
        Assert.Multiple(() =>
        {
            Assert.That(Value(metadata, "id"), Is.EqualTo("FlexLLM.Core"));
            Assert.That(Value(metadata, "license"), Is.EqualTo("Apache-2.0"));
            Assert.That(Value(metadata, "readme"), Is.EqualTo("README.md"));
            Assert.That(Value(metadata, "description"), Is.Not.Empty);
            Assert.That(metadata.ToString(), Does.Not.Contain("repository"), "The package says nothing of where it was built.");
            Assert.That(
                metadata.Descendants().Where(e => e.Name.LocalName == "dependency").Select(e => e.Attribute("id")!.Value),
                Is.EquivalentTo(new[] { "Microsoft.Extensions.Logging.Abstractions", "System.Numerics.Tensors" }));
        });
    }

    [Test]
    public void Package_ReleaseBinaries_NameNoFolderOfThisMachine()
    {
        if (Configuration != "Release")
        {
            Assert.Ignore("Debuggers of a debug build want the real paths.");
        }

        string root = Path.TrimEndingDirectorySeparator(SharedData.RepositoryRoot);
        Assert.That(Contains(Package, "FlexLLM.Core.dll", root), Is.False);
        Assert.That(Contains(Path.ChangeExtension(Package, ".snupkg"), "FlexLLM.Core.pdb", root), Is.False);
        Assert.That(Contains(Package, "FlexLLM.Core.dll", "/_/"), Is.True, "Control: the place of the paths is searched.");
    }

    [Test]
    public async Task Package_ConsoleProjectElsewhere_BuildsAndGenerates()
    {
        Directory.CreateDirectory(_folder["app"]);
        _folder.Write(Path.Combine("app", "App.csproj"), $"""
            <Project Sdk="Microsoft.NET.Sdk">
              <PropertyGroup>
                <OutputType>Exe</OutputType>
                <TargetFramework>net10.0</TargetFramework>
                <ImplicitUsings>enable</ImplicitUsings>
                <UseAppHost>false</UseAppHost>
                <NuGetAudit>false</NuGetAudit>
                <RestoreSources>{_folder["feed"]}</RestoreSources>
                <RestorePackagesPath>{_folder["packages"]}</RestorePackagesPath>
                <RestoreFallbackFolders>{string.Join(';', PackageFolders())}</RestoreFallbackFolders>
              </PropertyGroup>
              <ItemGroup>
                <PackageReference Include="FlexLLM.Core" Version="{Version}" />
              </ItemGroup>
            </Project>
            """);
        _folder.Write(Path.Combine("app", "Program.cs"), """
            using FlexLLM;

            var config = new ModelConfig
            {
                Architecture = ModelArchitecture.Llama,
                HiddenSize = 16,
                IntermediateSize = 32,
                LayerCount = 1,
                AttentionHeads = 2,
                KeyValueHeads = 1,
                HeadDim = 8,
                VocabularySize = 32,
                MaxPositions = 64,
            };
            RandomCheckpoint.Write(args[0], config, DType.F32, seed: 1);
            await using CoServingEngine engine = await CoServingEngine.LoadAsync(args[0], new CoServingOptions());
            GenerationResult result = await engine.CompleteAsync(new GenerationRequest([1, 2, 3])
            {
                MaxTokens = 8,
                IgnoreEos = true,
                Sampling = SamplingOptions.Greedy,
            });
            Console.WriteLine($"{result.Tokens.Count} tokens");
            """);

        Finished build = await Dotnet.RunAsync(
            _folder["app"], Limit, ["build", "-c", "Release", "-o", _folder["out"], "--disable-build-servers"]);
        Assert.That(build.ExitCode, Is.Zero, build.Output);
        Finished run = await Dotnet.RunAsync(_folder["app"], Limit, [Path.Combine(_folder["out"], "App.dll"), _folder["model"]]);
        Assert.That(run, Is.EqualTo(new Finished(0, $"8 tokens{Environment.NewLine}")));
    }

    // bin/CONFIGURATION/net10.0
    private static string Configuration =>
        new DirectoryInfo(Path.TrimEndingDirectorySeparator(AppContext.BaseDirectory)).Parent!.Name;

    // Where this repository's own restore put the packages that the library depends on.
    private static List<string> PackageFolders()
    {
        string assets = Path.Combine(SharedData.RepositoryRoot, "FlexLLM.Core", "obj", "project.assets.json");
        using JsonDocument json = JsonDocument.Parse(File.ReadAllBytes(assets));
        return [.. json.RootElement.GetProperty("packageFolders").EnumerateObject().Select(folder => folder.Name)];
    }

    // What makes a zip a package, around our files.
    private static bool IsEnvelope(string name) =>
        name is "[Content_Types].xml"
        || name.StartsWith("_rels/", StringComparison.Ordinal)
        || name.StartsWith("package/", StringComparison.Ordinal);

    private static bool Contains(string package, string file, string text)
    {
        using ZipArchive zip = ZipFile.OpenRead(package);
        using Stream stream = zip.GetEntry($"lib/net10.0/{file}")!.Open();
        using var bytes = new MemoryStream();
        stream.CopyTo(bytes);
        return bytes.ToArray().AsSpan().IndexOf(Encoding.UTF8.GetBytes(text)) >= 0;
    }

    private static string Value(XElement metadata, string name) =>
        metadata.Elements().Single(e => e.Name.LocalName == name).Value;
}
