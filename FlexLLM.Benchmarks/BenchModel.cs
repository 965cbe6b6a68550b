using System.Runtime.InteropServices;
using System.Text.Json;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Formats;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>A model folder loaded onto the CPU backend for one verb.</summary>
internal sealed class BenchModel : IDisposable
{
    private readonly CpuBackend _backend;

    private BenchModel(string folder, CpuBackend backend, LoadedModel model)
    {
        Name = Path.GetFileName(Path.TrimEndingDirectorySeparator(folder));
        _backend = backend;
        Model = model;
    }

    /// <summary>Name of the model's folder.</summary>
    public string Name { get; }

    public IComputeBackend Backend => _backend;

    /// <summary>Storage of the head; a checkpoint of mixed types may hold other matrices otherwise.</summary>
    public DType WeightType => Model.Matrix(Model.Program.Logits.Weight).Type;

    public LoadedModel Model { get; }

    /// <summary>Loads a folder for sequences of at most that many tokens; null keeps the stored type of the weights.</summary>
    public static BenchModel Open(string folder, int threads, DType? weights, int positions)
    {
        ModelConfig config = ModelConfig.Load(folder);
        if (positions > config.MaxPositions)
        {
            throw new ArgumentException($"{positions} tokens are asked for; the model takes at most {config.MaxPositions}.");
        }

        Console.Error.WriteLine($"loading {folder}");
        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(folder);
        var backend = new CpuBackend(threads);
        try
        {
            return new BenchModel(folder, backend, LoadedModel.Load(checkpoint, config, backend, weights, positions));
        }
        catch
        {
            backend.Dispose();
            throw;
        }
    }

    /// <summary>Weights that one step multiplies rows with: every linear layer, and the head.</summary>
    public IEnumerable<DeviceWeight> Streamed => Model.Program.Body.Append(Model.Program.Logits)
        .Where(i => i.Op is OpKind.Linear or OpKind.Logits)
        .Select(i => Model.Matrix(i.Weight));

    /// <summary>Multiply-adds, doubled, of one token through the linear layers; no head, no attention.</summary>
    public double FlopsPerToken => Model.Program.Body
        .Where(i => i.Op == OpKind.Linear)
        .Sum(i => 2.0 * Model.Matrix(i.Weight).OutFeatures * Model.Matrix(i.Weight).InFeatures);

    /// <summary>Random ids of the vocabulary.</summary>
    public int[] RandomIds(int count, ulong seed)
    {
        var random = new SeededRandom(seed);
        return FinetuningData.RandomIds(ref random, Model.Config.VocabularySize, count);
    }

    /// <summary>One line about model and device.</summary>
    public string Describe() =>
        $"{Name}, {WeightType} weights, {Backend.Name}, {Model.WeightBytes / 1048576.0:N0} MiB";

    /// <summary>Writes what a reader of the figures must know about where they come from.</summary>
    public void Write(Utf8JsonWriter json)
    {
        json.WriteString("model", Name);
        json.WriteString("weights", WeightType.ToString());
        json.WriteString("backend", Backend.Name);
        json.WriteNumber("weight_bytes", Model.WeightBytes);
        json.WriteNumber("processors", Environment.ProcessorCount);
        json.WriteString("os", RuntimeInformation.OSDescription);
        json.WriteString("runtime", RuntimeInformation.FrameworkDescription);
    }

    public void Dispose()
    {
        Model.Dispose();
        _backend.Dispose();
    }
}
