using System.Diagnostics;

namespace FlexLLM.Tests.Repository;

/// <summary>What a finished process left: its exit code and both of its streams.</summary>
internal sealed record Finished(int ExitCode, string Output);

/// <summary>Runs the dotnet command as from a fresh shell: a test host has the variables of the build that started it.</summary>
internal static class Dotnet
{
    /// <summary>Runs to the end, or kills the process and its children and throws <see cref="TimeoutException"/>.</summary>
    public static async Task<Finished> RunAsync(string folder, TimeSpan limit, params string[] arguments)
    {
        string program = Environment.GetEnvironmentVariable("DOTNET_HOST_PATH") ?? "dotnet";
        var start = new ProcessStartInfo(program, arguments)
        {
            WorkingDirectory = folder,
            RedirectStandardOutput = true,
            RedirectStandardError = true,
        };
        foreach (string name in start.Environment.Keys.Where(IsOfTheBuild).ToList())
        {
            start.Environment.Remove(name);
        }

        start.Environment["MSBUILDDISABLENODEREUSE"] = "1"; // No process outlives the test.
        start.Environment["DOTNET_CLI_USE_MSBUILD_SERVER"] = "0";
        start.Environment["UseSharedCompilation"] = "false";
        using Process process = Process.Start(start) ?? throw new InvalidOperationException($"'{program}' did not start.");
        using var timeout = new CancellationTokenSource(limit);
        Task<string> output = process.StandardOutput.ReadToEndAsync(timeout.Token);
        Task<string> errors = process.StandardError.ReadToEndAsync(timeout.Token);
        try
        {
            await process.WaitForExitAsync(timeout.Token);
            return new Finished(process.ExitCode, await output + await errors);
        }
        catch (OperationCanceledException)
        {
            process.Kill(entireProcessTree: true);
            throw new TimeoutException($"dotnet {string.Join(' ', arguments)} took more than {limit.TotalSeconds} s.");
        }
    }

    private static bool IsOfTheBuild(string variable) =>
        variable.StartsWith("MSBuild", StringComparison.OrdinalIgnoreCase)
        || variable.StartsWith("VSTest", StringComparison.OrdinalIgnoreCase);
}
