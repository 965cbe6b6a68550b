using NUnit.Framework;

namespace FlexLLM.Tests.Support;

/// <summary>Approved text: its diff is the review. FLEXLLM_APPROVE=1 rewrites the file.</summary>
internal static class GoldenText
{
    private const string Approve = "FLEXLLM_APPROVE";

    /// <summary>Compares with a file of the test project, named by its folders.</summary>
    public static void Check(string actual, params string[] path)
    {
        string file = Path.Combine([SharedData.RepositoryRoot, "FlexLLM.Core.Tests", .. path]);
        if (Environment.GetEnvironmentVariable(Approve) == "1")
        {
            File.WriteAllText(file, actual);
        }

        string expected = File.Exists(file) ? File.ReadAllText(file).ReplaceLineEndings("\n") : string.Empty;
        Assert.That(actual, Is.EqualTo(expected), $"If that is meant, run the test once with {Approve}=1 and commit {path[^1]}.");
    }
}
