using System.Text;
using System.Text.Json;
using FlexLLM.Formats;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;
using Microsoft.Extensions.Logging;

namespace FlexLLM.Engine;

/// <summary>
/// A latency model on disk, for one shape of model on one kind of machine. It only saves time: whatever is wrong with it is a
/// warning, and the engine profiles the machine as if there were none.
/// </summary>
internal sealed class LatencyProfileFile(string folder, string key, ILogger logger)
{
    private const string Format = "flexllm-latency";
    private const int Version = 2;

    // Longer than any step can take.
    private const double SecondsMax = 1e6;

    /// <summary>The file; its name is made from the key.</summary>
    public string Path { get; } =
        System.IO.Path.Combine(folder, $"latency-{StableHash.Of(Encoding.UTF8.GetBytes(key)):x16}.json");

    /// <summary>Everything that a step's time depends on, but for the step.</summary>
    public static string KeyOf(LoadedModel model, CoServingOptions options)
    {
        ModelConfig c = model.Config;
        return $"{c.Architecture} hidden={c.HiddenSize} intermediate={c.IntermediateSize} layers={c.LayerCount} " +
            $"heads={c.AttentionHeads}/{c.KeyValueHeads}x{c.HeadDim} vocabulary={c.VocabularySize} " +
            $"weights={model.Matrix(model.Program.Logits.Weight).Type} backend={model.Backend.Name} " +
            $"machine={HostMachine.Name} " +
            $"rows={options.TokensPerStepMax} sequences={options.SequencesMax}";
    }

    /// <summary>The model that was saved, or null where there is none that can be used.</summary>
    public LatencyModel? TryLoad()
    {
        if (!File.Exists(Path))
        {
            return null;
        }

        try
        {
            return Parse();
        }
        catch (Exception e) when (e is InvalidFileException or IOException or UnauthorizedAccessException)
        {
            logger.LogWarning("The saved latency profile is not used. {Fault}", e.Message);
            return null;
        }
    }

    /// <summary>Writes the model; a folder that cannot be written to costs a warning.</summary>
    public void Save(in LatencyModel model)
    {
        LatencyModel saved = model;
        try
        {
            Directory.CreateDirectory(folder);
            AtomicFile.WriteJson(Path, json => Write(json, saved));
        }
        catch (Exception e) when (e is IOException or UnauthorizedAccessException)
        {
            logger.LogWarning("The latency profile was not saved. {Fault}", e.Message);
        }
    }

    /// <summary>The model in a file of whatever machine, to plan or simulate it elsewhere.</summary>
    /// <exception cref="InvalidFileException">The file is missing or is no profile.</exception>
    public static LatencyModel Read(string path) => Parse(new JsonFields(JsonFile.Load(path), path));

    /// <summary>Writes the properties that <see cref="Read"/> reads; an object may have others beside them.</summary>
    public static void WriteModel(Utf8JsonWriter json, in LatencyModel model)
    {
        json.WriteString("format", Format);
        json.WriteNumber("version", Version);
        json.WriteNumber("correction", model.Correction);
        json.WriteNumber("tail", model.Tail);
        json.WriteStartObject("seconds");
        foreach (LatencyTerm term in Enum.GetValues<LatencyTerm>())
        {
            json.WriteNumber(term.ToString(), model.Coefficients[term]);
        }

        json.WriteEndObject();
    }

    private LatencyModel Parse()
    {
        var fields = new JsonFields(JsonFile.Load(Path), Path);
        Require(fields, "key", key);
        return Parse(fields);
    }

    private static LatencyModel Parse(JsonFields fields)
    {
        Require(fields, "format", Format);
        fields.Int32("version", Version, Version);
        JsonFields seconds = fields.OptionalObject("seconds") ?? throw fields.Missing("seconds");
        double[] values = new double[LatencyCoefficients.Count];
        foreach (LatencyTerm term in Enum.GetValues<LatencyTerm>())
        {
            values[(int)term] = seconds.Double(term.ToString(), 0.0, SecondsMax);
        }

        // A model that believes that a step takes no time could never learn better.
        if (values.Sum() <= 0.0)
        {
            throw fields.Fault("seconds", "are all zero");
        }

        return new LatencyModel(
            LatencyCoefficients.From(values),
            fields.Double("correction", 1.0 / LatencyModel.CorrectionMax, LatencyModel.CorrectionMax),
            fields.Double("tail", 1.0, LatencyModel.TailMax));
    }

    private void Write(Utf8JsonWriter json, LatencyModel model)
    {
        json.WriteStartObject();
        json.WriteString("key", key);
        WriteModel(json, model);
        json.WriteEndObject();
    }

    private static void Require(JsonFields fields, string name, string expected)
    {
        string found = fields.String(name);
        if (found != expected)
        {
            throw fields.Fault(name, $"is {JsonFile.Quote(found)}; expected is '{expected}'");
        }
    }
}
