using System.Globalization;
using System.Reflection;
using System.Runtime.CompilerServices;
using System.Text;

namespace FlexLLM.Tests.Repository;

/// <summary>
/// Prints what an assembly offers to its users: a block a type, a line a member, in ordinal order. Nullability of references,
/// and what the compiler adds to a record, are left out.
/// </summary>
internal static class PublicApi
{
    private const BindingFlags Declared =
        BindingFlags.Public | BindingFlags.NonPublic | BindingFlags.Instance | BindingFlags.Static | BindingFlags.DeclaredOnly;

    private static readonly Dictionary<Type, string> Keywords = new()
    {
        [typeof(void)] = "void",
        [typeof(object)] = "object",
        [typeof(string)] = "string",
        [typeof(bool)] = "bool",
        [typeof(byte)] = "byte",
        [typeof(char)] = "char",
        [typeof(short)] = "short",
        [typeof(ushort)] = "ushort",
        [typeof(int)] = "int",
        [typeof(uint)] = "uint",
        [typeof(long)] = "long",
        [typeof(ulong)] = "ulong",
        [typeof(float)] = "float",
        [typeof(double)] = "double",
    };

    /// <summary>The types that a user of the assembly can name, as text with a line feed after each line.</summary>
    public static string Print(IEnumerable<Type> types)
    {
        var text = new StringBuilder();
        foreach (Type type in types.OrderBy(FullName, StringComparer.Ordinal))
        {
            text.Append(Heading(type)).Append('\n');
            foreach (string member in Members(type).Order(StringComparer.Ordinal))
            {
                text.Append("    ").Append(member).Append('\n');
            }

            text.Append('\n');
        }

        return text.ToString();
    }

    private static string Heading(Type type)
    {
        bool record = IsRecord(type);
        string kind = type switch
        {
            { IsEnum: true } => $"enum {FullName(type)} : {Name(Enum.GetUnderlyingType(type))}",
            { IsInterface: true } => "interface " + FullName(type),
            { IsValueType: true } => $"{(IsReadOnly(type) ? "readonly " : "")}{(record ? "record " : "")}struct {FullName(type)}",
            _ when type.IsSubclassOf(typeof(Delegate)) => "delegate " + FullName(type),
            { IsAbstract: true, IsSealed: true } => "static class " + FullName(type),
            { IsAbstract: true } => $"abstract {(record ? "record" : "class")} {FullName(type)}",
            _ => $"{(type.IsSealed ? "sealed " : "")}{(record ? "record" : "class")} {FullName(type)}",
        };
        if (type.IsEnum)
        {
            return kind;
        }

        IEnumerable<string> bases = type.GetInterfaces().Except(type.BaseType?.GetInterfaces() ?? [])
            .Where(used => !(record && used == typeof(IEquatable<>).MakeGenericType(type)))
            .Select(Name).Order(StringComparer.Ordinal);
        if (type.BaseType is Type parent && parent != typeof(object) && parent != typeof(ValueType))
        {
            bases = bases.Prepend(Name(parent));
        }

        string all = string.Join(", ", bases);
        return all.Length == 0 ? kind : $"{kind} : {all}";
    }

    private static IEnumerable<string> Members(Type type)
    {
        if (type.IsEnum)
        {
            return type.GetEnumNames().Select(name => $"{Enum.Format(type, Enum.Parse(type, name), "d")} {name}");
        }

        IEnumerable<string> fields = type.GetFields(Declared).Where(IsVisible).Select(Field);
        IEnumerable<string> constructors = type.GetConstructors(Declared).Where(IsVisible)
            .Where(method => !(IsRecord(type) && IsCopy(method, type)))
            .Select(method => $"{Access(method)}new({Parameters(method)})");
        IEnumerable<string> properties = type.GetProperties(Declared)
            .Where(property => property.GetAccessors(true).Any(IsVisible) && property.Name != "EqualityContract")
            .Select(Property);
        IEnumerable<string> events = type.GetEvents(Declared).Where(e => e.AddMethod is MethodInfo add && IsVisible(add))
            .Select(e => $"{Access(e.AddMethod!)}event {Name(e.EventHandlerType!)} {e.Name}");
        IEnumerable<string> methods = type.GetMethods(Declared).Where(IsVisible)
            .Where(method => !method.IsDefined(typeof(CompilerGeneratedAttribute)))
            .Where(method => !method.IsSpecialName || method.Name.StartsWith("op_", StringComparison.Ordinal))
            .Select(Method);
        return [.. fields, .. constructors, .. properties, .. events, .. methods];
    }

    private static string Method(MethodInfo method) =>
        $"{Access(method)}{Name(method.ReturnType)} {method.Name}{Arguments(method)}({Parameters(method)})";

    private static string Field(FieldInfo field) => field.IsLiteral
        ? $"const {Name(field.FieldType)} {field.Name} = {Literal(field.GetRawConstantValue())}"
        : $"{(field.IsStatic ? "static " : "")}{(field.IsInitOnly ? "readonly " : "")}{Name(field.FieldType)} {field.Name}";

    private static string Property(PropertyInfo property)
    {
        string accessors = string.Concat(property.GetAccessors(nonPublic: true).Where(IsVisible).Select(accessor =>
            accessor.ReturnType != typeof(void) ? "get; " : IsInit(accessor) ? "init; " : "set; "));
        string required = property.IsDefined(typeof(RequiredMemberAttribute)) ? "required " : "";
        ParameterInfo[] indexes = property.GetIndexParameters();
        string name = indexes.Length == 0 ? property.Name : $"this[{string.Join(", ", indexes.Select(Parameter))}]";
        string access = Access(property.GetAccessors(true).First(IsVisible));
        return $"{access}{required}{Name(property.PropertyType)} {name} {{ {accessors}}}";
    }

    private static bool IsInit(MethodInfo setter) =>
        setter.ReturnParameter.GetRequiredCustomModifiers().Contains(typeof(IsExternalInit));

    private static string Access(MethodBase method)
    {
        string visible = method.IsPublic ? "" : "protected ";
        string bound = method switch
        {
            { IsConstructor: true } => "",
            { IsStatic: true, IsAbstract: true } => "static abstract ",
            { IsStatic: true } => "static ",
            { DeclaringType.IsInterface: true } => "",
            { IsAbstract: true } => "abstract ",
            { IsVirtual: true } when IsOverride(method) => "override ",
            { IsVirtual: true, IsFinal: false } => "virtual ",
            _ => "",
        };
        return visible + bound;
    }

    private static bool IsOverride(MethodBase method) => method is MethodInfo info && info.GetBaseDefinition() != info;

    private static string Arguments(MethodBase method) =>
        method.IsGenericMethod ? $"<{string.Join(", ", method.GetGenericArguments().Select(Name))}>" : "";

    private static string Parameters(MethodBase method) =>
        (method.IsDefined(typeof(ExtensionAttribute)) ? "this " : "")
        + string.Join(", ", method.GetParameters().Select(Parameter));

    private static string Parameter(ParameterInfo parameter)
    {
        string passing = parameter switch
        {
            { ParameterType.IsByRef: false } => parameter.IsDefined(typeof(ParamArrayAttribute)) ? "params " : "",
            { IsOut: true } => "out ",
            { IsIn: true } => "in ",
            _ => "ref ",
        };
        Type type = parameter.ParameterType.IsByRef ? parameter.ParameterType.GetElementType()! : parameter.ParameterType;
        string value = parameter.HasDefaultValue ? $" = {Literal(parameter.RawDefaultValue)}" : "";
        return $"{passing}{Name(type)} {parameter.Name}{value}";
    }

    private static string Literal(object? value) => value switch
    {
        null => "default",
        string text => $"\"{text}\"",
        bool flag => flag ? "true" : "false",
        _ => Convert.ToString(value, CultureInfo.InvariantCulture)!,
    };

    private static string FullName(Type type)
    {
        string outer = type.DeclaringType is Type parent ? FullName(parent) : type.Namespace ?? "";
        return $"{outer}.{Own(type)}";
    }

    private static string Name(Type type)
    {
        if (Keywords.TryGetValue(type, out string? keyword))
        {
            return keyword;
        }

        if (type.IsArray || type.IsPointer)
        {
            return Name(type.GetElementType()!) + (type.IsArray ? $"[{new string(',', type.GetArrayRank() - 1)}]" : "*");
        }

        if (type.IsByRef)
        {
            return "ref " + Name(type.GetElementType()!);
        }

        return Nullable.GetUnderlyingType(type) is Type value ? Name(value) + "?"
            : type.IsNested && !type.IsGenericParameter ? $"{Name(type.DeclaringType!)}.{Own(type)}" : Own(type);
    }

    private static string Own(Type type) => type.IsGenericType
        ? $"{type.Name.Split('`')[0]}<{string.Join(", ", type.GetGenericArguments().Select(Name))}>"
        : type.Name;

    private static bool IsVisible(FieldInfo field) => field.IsPublic || field.IsFamily || field.IsFamilyOrAssembly;

    private static bool IsVisible(MethodBase method) => method.IsPublic || method.IsFamily || method.IsFamilyOrAssembly;

    private static bool IsReadOnly(Type type) => type.IsDefined(typeof(IsReadOnlyAttribute));

    private static bool IsRecord(Type type) =>
        type.GetMethod("PrintMembers", Declared)?.IsDefined(typeof(CompilerGeneratedAttribute)) ?? false;

    private static bool IsCopy(ConstructorInfo method, Type type) =>
        method.GetParameters() is [ParameterInfo only] && only.ParameterType == type;
}
