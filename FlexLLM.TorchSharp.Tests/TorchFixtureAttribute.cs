using FlexLLM.Tests.Support;
using NUnit.Framework;
using NUnit.Framework.Interfaces;
using NUnit.Framework.Internal;

namespace FlexLLM.Tests;

/// <summary>
/// A fixture of category Torch. Where libtorch cannot be loaded, or TorchSharp is its contract, it holds one test, ignored with
/// that reason, in place of hundreds.
/// </summary>
[AttributeUsage(AttributeTargets.Class)]
internal sealed class TorchFixtureAttribute : NUnitAttribute, IFixtureBuilder2
{
    private static readonly Lazy<string?> Fault = new(() => TestDevice.FaultOf("cpu"));

    /// <summary>Why no Torch test can run here; null where they can.</summary>
    public static string? Reason => Fault.Value;

    public IEnumerable<TestSuite> BuildFrom(ITypeInfo typeInfo) => BuildFrom(typeInfo, MissableFixture.All);

    public IEnumerable<TestSuite> BuildFrom(ITypeInfo typeInfo, IPreFilter filter)
    {
        foreach (TestSuite suite in MissableFixture.Suites(typeInfo, filter, [], Reason))
        {
            suite.Properties.Add(PropertyNames.Category, "Torch");
            yield return suite;
        }
    }
}
