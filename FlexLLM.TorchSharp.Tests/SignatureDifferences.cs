using System.Globalization;
using System.Reflection;

namespace FlexLLM.Tests;

/// <summary>What code compiled against one type would not find in another.</summary>
internal static class SignatureDifferences
{
    private const BindingFlags Declared =
        BindingFlags.Public | BindingFlags.Instance | BindingFlags.Static | BindingFlags.DeclaredOnly;

    /// <summary>One line for each public member of <paramref name="promised"/> that <paramref name="real"/> lacks.</summary>
    public static List<string> Of(Type promised, Type? real)
    {
        if (real is null)
        {
            return [$"{promised}: no such type"];
        }

        List<string> differences = Kind(promised) == Kind(real) ? [] : [$"{promised}: {Kind(promised)} is {Kind(real)}"];
        foreach (MemberInfo member in promised.GetMembers(Declared))
        {
            if (member is Type or FieldInfo { IsSpecialName: true })
            {
                continue;
            }

            string signature = Print(member);
            List<string> candidates = [.. real.GetMember(member.Name, Declared).Select(Print)];
            if (!candidates.Contains(signature))
            {
                differences.Add($"{promised}: {signature}, but there is {string.Join(" / ", candidates.DefaultIfEmpty("nothing"))}");
            }
        }

        return differences;
    }

    // Structs and classes are called otherwise; a base type is not promised.
    private static string Kind(Type type) =>
        type.IsEnum ? $"enum of {type.GetEnumUnderlyingType()}" : type.IsValueType ? "struct" : type.IsInterface ? "interface" : "class";

    private static string Print(MemberInfo member) => member switch
    {
        FieldInfo { IsLiteral: true } field => $"{field.Name} = {Text(field.GetRawConstantValue())}",
        FieldInfo field => $"{Static(field.IsStatic)}{field.FieldType} {field.Name}",
        PropertyInfo property => $"{property.PropertyType} {property.Name}",
        MethodBase method => $"{Static(method.IsStatic)}{(method as MethodInfo)?.ReturnType} {method.Name}({Parameters(method)})",
        _ => member.ToString()!,
    };

    private static string Parameters(MethodBase method) => string.Join(", ", method.GetParameters().Select(parameter =>
        $"{parameter.ParameterType} {parameter.Name}{(parameter.HasDefaultValue ? $" = {Text(parameter.RawDefaultValue)}" : "")}"));

    private static string Static(bool isStatic) => isStatic ? "static " : "";

    private static string Text(object? value) => Convert.ToString(value, CultureInfo.InvariantCulture) ?? "null";
}
