using NUnit.Framework;

namespace FlexLLM.Tests;

/// <summary>Finds reference data that lies beside the repository on some machines and must not be needed.</summary>
internal static class SharedData
{
    /// <summary>Path of a file or folder in the reference data; ignores the calling test where it is absent.</summary>
    public static string Require(params string[] parts)
    {
        string? root = Environment.GetEnvironmentVariable("FLEXLLM_SHARED") ?? Beside(RepositoryRoot);
        string path = root is null ? string.Empty : Path.Combine([root, .. parts]);
        if (!Path.Exists(path))
        {
            Assert.Ignore($"Reference data '{Path.Combine(parts)}' is not on this machine.");
        }

        return path;
    }

    /// <summary>The folder that holds FlexLLM.sln (compiler-recorded paths are rewritten in deterministic builds).</summary>
    public static string RepositoryRoot
    {
        get
        {
            DirectoryInfo? folder = new(AppContext.BaseDirectory);
            while (folder is not null && !File.Exists(Path.Combine(folder.FullName, "FlexLLM.sln")))
            {
                folder = folder.Parent;
            }

            return folder?.FullName ?? throw new DirectoryNotFoundException("No FlexLLM.sln above the test binaries.");
        }
    }

    private static string? Beside(string repository)
    {
        string path = Path.GetFullPath(Path.Combine(repository, "..", "shared"));
        return Directory.Exists(path) ? path : null;
    }
}
