using System.Runtime.InteropServices;
using System.Text.Json;
using FlexLLM.Backends;
using FlexLLM.Benchmarks.Serving;
using FlexLLM.Formats;
using FlexLLM.Models;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>A model folder, or random weights of a shape, on a device for one verb.</summary>
internal sealed class BenchModel : IDisposable
{
    /// <summary>Where the model comes from and where it goes to, in the usage of a verb.</summary>
    public const string Usage = ModelChoice.Usage + " " + DeviceChoice.Usage + " [--threads 2] [--weights f32|bf16]";

    /// <summary>Names of the options.</summary>
    public static readonly string[] Options = [.. ModelChoice.Options, .. DeviceChoice.Options, "--threads", "--weights"];

    private readonly DeviceChoice _device;
    private readonly int _threads;

    private BenchModel(string name, (DeviceChoice Device, int Threads) where, LoadedModel model)
    {
        Name = name;
        (_device, _threads) = where;
        Model = model;
        Work = ModelWork.Of(model);
    }

    /// <summary>Name of the model's folder or shape.</summary>
    public string Name { get; }

    public IComputeBackend Backend => Model.Backend;

    /// <summary>Storage of the head; a checkpoint of mixed types may hold other matrices otherwise.</summary>
    public DType WeightType => Model.Matrix(Model.Program.Logits.Weight).Type;

    public LoadedModel Model { get; }

    /// <summary>What its tokens cost.</summary>
    public ModelWork Work { get; }

    /// <summary>Loads what the arguments name, for sequences of at most that many tokens.</summary>
    public static BenchModel Open(string[] args, int positions)
    {
        ModelChoice choice = ModelChoice.Parse(args);
        DType? weights = CommandLine.WeightType(args, "--weights");
        int threads = CommandLine.Int(args, "--threads", 2, min: 1);
        DeviceChoice device = DeviceChoice.Parse(args);
        ModelConfig config = choice.Config();
        if (positions > config.MaxPositions)
        {
            throw new ArgumentException($"{positions} tokens are asked for; the model takes at most {config.MaxPositions}.");
        }

        IComputeBackend backend = BenchDevice.Create(device, threads).CreateBackend();
        try
        {
            return new BenchModel(choice.Name, (device, threads), Load(choice, config, backend, weights, positions));
        }
        catch
        {
            backend.Dispose();
            throw;
        }
    }

    /// <summary>Measures what the device does at best; a second or two.</summary>
    public Roofline MeasureRoofline() => RooflineMeasurement.Of(_device, BenchDevice.Create(_device, _threads), _threads);

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
        Backend.Dispose();
    }

    private static LoadedModel Load(ModelChoice choice, ModelConfig config, IComputeBackend backend, DType? weights, int positions)
    {
        using RandomWeights? random = choice.Weights(weights);
        Console.Error.WriteLine($"loading {choice.Name}");
        if (random is not null)
        {
            return LoadedModel.CreateRandom(random, backend, positions);
        }

        using SafetensorsCheckpoint checkpoint = SafetensorsCheckpoint.Open(choice.Source);
        return LoadedModel.Load(checkpoint, config, backend, weights, positions);
    }
}
