using System.Reflection;
using System.Runtime.Loader;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>The contract promises nothing that TorchSharp does not have.</summary>
[TestFixture]
internal sealed class TorchSharpContractTests
{
    private static bool IsContract(Assembly assembly) =>
        assembly.GetCustomAttributes<AssemblyMetadataAttribute>().Any(a => a.Key == "FlexLLM.Contract");

    [Test]
    public void Contract_EveryMember_IsInTorchSharp()
    {
        Assembly real = typeof(torch).Assembly;
        if (IsContract(real))
        {
            Assert.Ignore("TorchSharp is not present: these tests were built against its contract.");
        }

        Type[] promised = Contract().GetExportedTypes();
        string[] differences = [.. promised.SelectMany(type => SignatureDifferences.Of(type, real.GetType(type.FullName!)))];
        Assert.That(differences, Is.Empty, string.Join('\n', differences));
        TestContext.Out.WriteLine($"{promised.Length} types against {real.GetName()}");
    }

    [Test]
    public void Contract_Members_AreManyAndHaveNoCode()
    {
        Assembly contract = Contract();
        Assert.That(IsContract(contract), Is.True);
        Assert.That(contract.GetExportedTypes().Sum(type => type.GetMembers().Length), Is.GreaterThan(60));
        MethodInfo method = contract.GetType("TorchSharp.torch")!.GetMethod("NewDisposeScope")!;
        Assert.That(
            () => method.Invoke(null, null), Throws.InnerException.TypeOf<NotSupportedException>(), "Nobody takes it for TorchSharp.");
    }

    [TestCase(typeof(Right), 0)]
    [TestCase(typeof(OtherName), 1)]
    [TestCase(typeof(OtherDefault), 1)]
    [TestCase(typeof(OtherType), 1)]
    [TestCase(typeof(NotStatic), 1)]
    [TestCase(typeof(Missing), 1)]
    [TestCase(null, 1)]
    public void Differences_PlantedFault_IsFound(Type? real, int count)
    {
        List<string> found = SignatureDifferences.Of(typeof(Promise), real);
        Assert.That(found, Has.Count.EqualTo(count), string.Join('\n', found));
    }

    [Test]
    public void Differences_EnumValueOrWidth_IsFound() =>
        Assert.That(SignatureDifferences.Of(typeof(Digits), typeof(OtherDigits)), Has.Count.EqualTo(2));

    // A context of its own: two assemblies of one name.
    private static Assembly Contract() => new AssemblyLoadContext("contract")
        .LoadFromAssemblyPath(Path.Combine(AppContext.BaseDirectory, "contract", "TorchSharp.dll"));

#pragma warning disable CA1028, CA1052, CA1822 // Samples of signatures.
    public enum Digits : sbyte
    {
        One = 1,
    }

    public enum OtherDigits
    {
        One = 2,
    }

    public sealed class Promise
    {
        public static int Size(long rows, bool flag = false) => flag ? 1 : (int)rows;
    }

    public sealed class Right
    {
        public static int Size(long rows, bool flag = false) => flag ? 1 : (int)rows;

        public static int Size(int rows) => rows;
    }

    public sealed class OtherName
    {
        public static int Size(long count, bool flag = false) => flag ? 1 : (int)count;
    }

    public sealed class OtherDefault
    {
        public static int Size(long rows, bool flag = true) => flag ? 1 : (int)rows;
    }

    public sealed class OtherType
    {
        public static long Size(long rows, bool flag = false) => flag ? 1 : rows;
    }

    public sealed class NotStatic
    {
        public int Size(long rows, bool flag = false) => flag ? 1 : (int)rows;
    }

    public sealed class Missing;
#pragma warning restore
}
