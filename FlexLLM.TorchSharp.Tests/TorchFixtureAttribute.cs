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
    private static readonly Lazy<string?> Fault = new(FindFault);

    /// <summary>Why no Torch test can run here; null where they can.</summary>
    public static string? Reason => Fault.Value;

    public IEnumerable<TestSuite> BuildFrom(ITypeInfo typeInfo) => BuildFrom(typeInfo, new Only(null));

    public IEnumerable<TestSuite> BuildFrom(ITypeInfo typeInfo, IPreFilter filter)
    {
        string? kept = typeInfo.Type.GetMethods().First(method => method.IsDefined(typeof(TestAttribute), inherit: false)).Name;
        IPreFilter chosen = Reason is null ? filter : new Only(kept);
        foreach (TestSuite suite in new TestFixtureAttribute().BuildFrom(typeInfo, chosen))
        {
            suite.Properties.Add(PropertyNames.Category, "Torch");
            if (Reason is string reason)
            {
                suite.RunState = RunState.Ignored;
                suite.Properties.Set(PropertyNames.SkipReason, reason);
            }

            yield return suite;
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

    private sealed class Only(string? name) : IPreFilter
    {
        public bool IsMatch(Type type) => true;

        public bool IsMatch(Type type, System.Reflection.MethodInfo method) => name is null || method.Name == name;
    }
}
