using System.Diagnostics;
using System.Diagnostics.CodeAnalysis;
using System.Runtime.CompilerServices;

namespace FlexLLM.Primitives;

/// <summary>Invariants that hold in Release too. A broken one is a bug in this library and stops the engine.</summary>
internal static class Check
{
    /// <summary>Throws <see cref="UnreachableException"/> naming the broken condition.</summary>
    public static void That(
        [DoesNotReturnIf(false)] bool condition, [CallerArgumentExpression(nameof(condition))] string text = "")
    {
        if (!condition)
        {
            Fail(text);
        }
    }

    [DoesNotReturn]
    private static void Fail(string text) => throw new UnreachableException($"Invariant broken: {text}");
}
