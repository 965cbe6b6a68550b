using NUnit.Framework;
using NUnit.Framework.Interfaces;
using NUnit.Framework.Internal;

namespace FlexLLM.Tests;

/// <summary>Ignores a fixture, and says why, where libtorch cannot be loaded or TorchSharp is its contract.</summary>
[AttributeUsage(AttributeTargets.Class)]
internal sealed class RequiresTorchAttribute : CategoryAttribute, IApplyToTest
{
    private static readonly Lazy<string?> Fault = new(FindFault);

    public RequiresTorchAttribute()
        : base("Torch")
    {
    }

    /// <summary>Why no Torch test can run here; null where they can.</summary>
    public static string? Reason => Fault.Value;

    void IApplyToTest.ApplyToTest(Test test)
    {
        ApplyToTest(test);
        if (Reason is string reason && test.RunState != RunState.NotRunnable)
        {
            test.RunState = RunState.Ignored;
            test.Properties.Set(PropertyNames.SkipReason, reason);
        }
    }

    private static string? FindFault()
    {
        try
        {
            TorchBackend.Create("cpu");
            return null;
        }
        catch (FlexLlmException e)
        {
            return e.Message;
        }
    }
}
