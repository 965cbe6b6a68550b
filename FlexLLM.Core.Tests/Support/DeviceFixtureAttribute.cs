using NUnit.Framework;
using NUnit.Framework.Interfaces;
using NUnit.Framework.Internal;

namespace FlexLLM.Tests.Support;

/// <summary>
/// A fixture whose tests run on the <see cref="TestDevice"/>, whichever it is. Where that is missing it holds one test, ignored with
/// the reason, in place of many.
/// </summary>
[AttributeUsage(AttributeTargets.Class, AllowMultiple = true)]
internal sealed class DeviceFixtureAttribute(params object?[] arguments) : NUnitAttribute, IFixtureBuilder2
{
    public IEnumerable<TestSuite> BuildFrom(ITypeInfo typeInfo) => BuildFrom(typeInfo, MissableFixture.All);

    public IEnumerable<TestSuite> BuildFrom(ITypeInfo typeInfo, IPreFilter filter) =>
        MissableFixture.Suites(typeInfo, filter, arguments, TestDevice.Missing);
}

/// <summary>Suites of a fixture whose device may be missing: then one test, ignored with the reason, in place of many.</summary>
internal static class MissableFixture
{
    public static readonly IPreFilter All = new Only(null);

    /// <param name="typeInfo">The fixture.</param>
    /// <param name="filter">Chooses its tests where the device is there.</param>
    /// <param name="arguments">Of its constructor.</param>
    /// <param name="missing">Why the device is missing; null where it is there.</param>
    public static IEnumerable<TestSuite> Suites(ITypeInfo typeInfo, IPreFilter filter, object?[] arguments, string? missing)
    {
        IPreFilter chosen = missing is null ? filter : new Only(Simplest(typeInfo.Type));
        foreach (TestSuite suite in new TestFixtureAttribute(arguments).BuildFrom(typeInfo, chosen))
        {
            if (missing is string reason)
            {
                suite.RunState = RunState.Ignored;
                suite.Properties.Set(PropertyNames.SkipReason, reason);
            }

            yield return suite;
        }
    }

    // Of a method without parameters there is one test, not one for each of their values.
    private static string Simplest(Type fixture) => fixture.GetMethods()
        .Where(method => method.GetCustomAttributes(inherit: false).Any(a => a is ITestBuilder or TestAttribute))
        .MinBy(method => method.GetParameters().Length)!.Name;

    private sealed class Only(string? name) : IPreFilter
    {
        public bool IsMatch(Type type) => true;

        public bool IsMatch(Type type, System.Reflection.MethodInfo method) => name is null || method.Name == name;
    }
}

/// <summary>
/// A test, or a fixture of tests, that holds the managed backend to what it alone promises: the same bits in any company, threads,
/// scratch memory. On another <see cref="TestDevice"/> it is ignored with the reason.
/// </summary>
[AttributeUsage(AttributeTargets.Class | AttributeTargets.Method)]
internal sealed class ManagedOnlyAttribute(string reason) : NUnitAttribute, IApplyToTest
{
    public void ApplyToTest(Test test)
    {
        if (!TestDevice.IsManaged && test.RunState is RunState.Runnable)
        {
            test.RunState = RunState.Ignored;
            test.Properties.Set(PropertyNames.SkipReason, "Only the managed backend promises this: " + reason);
        }
    }
}
