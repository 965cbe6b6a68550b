namespace TorchSharp;

/// <summary>What every body here does.</summary>
internal static class Contract
{
    public static Exception NoCode() => new NotSupportedException(
        "This is the compile-time contract of TorchSharp, which has no code. Add the package TorchSharp itself.");
}
