using FsCheck;
using Microsoft.FSharp.Core;

namespace FlexLLM.Tests;

/// <summary>Property tests on the same inputs every time.</summary>
internal static class Repeatable
{
    /// <summary>So many inputs, drawn from this seed; a failure is thrown.</summary>
    public static Config Many(ulong seed, int count = 300) => Config.QuickThrowOnFailure
        .WithMaxTest(count)
        .WithReplay(FSharpOption<Replay>.Some(new Replay(new Rnd(seed), FSharpOption<int>.None)));
}
