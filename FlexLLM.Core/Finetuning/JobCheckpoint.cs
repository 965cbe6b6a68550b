using System.Globalization;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Formats;

namespace FlexLLM.Finetuning;

/// <summary>
/// A job at the boundary of an optimizer step, on the host: the adapter (as a PEFT folder) and optimizer.safetensors with the
/// moments and, in its metadata, the number of steps. What comes after depends on these, the model and the request alone.
/// </summary>
internal sealed class JobCheckpoint
{
    private const string StateFileName = "optimizer.safetensors";
    private const string StepsKey = "steps";
    private const string ParametersKey = "parameters";

    private readonly PeftConfig _config;
    private readonly IReadOnlyList<TensorToWrite> _weights;
    private readonly List<TensorToWrite> _state = [];
    private readonly string _parameters;

    private JobCheckpoint(TrainingRun run, IComputeBackend backend, string parameters)
    {
        _config = run.Adapter.Config;
        _weights = PeftFolder.Download(run.Adapter, backend);
        Steps = run.Cursor.Step;
        _parameters = parameters;
        foreach ((string name, AdapterTensor tensor, DeviceTensor moment) in run.Optimizer.State())
        {
            _state.Add(TensorToWrite.FromFloats(name, ShapeOf(tensor), tensor.Read(backend, moment)));
        }
    }

    /// <summary>Optimizer steps done.</summary>
    public int Steps { get; }

    /// <summary>Copies the state of the last optimizer step off the device. The group in progress is not part of it.</summary>
    public static JobCheckpoint Capture(TrainingRun run, IComputeBackend backend, string parameters) => new(run, backend, parameters);

    public void Save(string folder)
    {
        var metadata = new Dictionary<string, string>
        {
            [StepsKey] = Steps.ToString(CultureInfo.InvariantCulture),
            [ParametersKey] = _parameters,
        };

        // Both files carry the step, so that a stop between the two writes is noticed instead of mixing two states.
        PeftFolder.Save(folder, _config, _weights, baseModel: null, metadata);
        SafetensorsWriter.Write(Path.Combine(folder, StateFileName), _state, metadata);
    }

    /// <summary>
    /// Brings a fresh run of the same request to where the checkpoint stands; its adapter was loaded from the folder.
    /// </summary>
    /// <exception cref="InvalidFileException">A malformed checkpoint, or one of another request.</exception>
    public static void Restore(string folder, TrainingRun run, IComputeBackend backend, string parameters)
    {
        string path = Path.Combine(folder, StateFileName);
        if (!File.Exists(path))
        {
            throw new InvalidFileException(path, "file", "does not exist");
        }

        using SafetensorsFile file = SafetensorsFile.Open(path);
        if (!file.Metadata.TryGetValue(ParametersKey, out string? saved) || saved != parameters)
        {
            throw new InvalidFileException(
                path, ParametersKey, $"was saved by a job with other parameters ({saved ?? "none"}); this one has {parameters}");
        }

        if (!file.Metadata.TryGetValue(StepsKey, out string? text) || !int.TryParse(text, CultureInfo.InvariantCulture, out int steps) ||
            steps < 0 || steps > run.Cursor.Steps)
        {
            throw new InvalidFileException(path, StepsKey, $"must be a number of steps from 0 to {run.Cursor.Steps}");
        }

        string weightsPath = Path.Combine(folder, PeftFolder.WeightsFileName);
        using SafetensorsFile weights = SafetensorsFile.Open(weightsPath);
        if (!weights.Metadata.TryGetValue(StepsKey, out string? weightsStep) || weightsStep != text)
        {
            throw new InvalidFileException(
                weightsPath, StepsKey, $"is {weightsStep ?? "missing"}; {StateFileName} beside it is of step {text}");
        }

        foreach ((string name, AdapterTensor tensor, DeviceTensor moment) in run.Optimizer.State())
        {
            SafetensorsTensor stored = file.Get(name);
            long[] shape = ShapeOf(tensor);
            if (!stored.Shape.SequenceEqual(shape))
            {
                throw new InvalidFileException(path, name, $"must have shape [{string.Join(", ", shape)}]");
            }

            tensor.Write(backend, stored.ToFloats(), moment);
        }

        run.ResumeAfter(steps);
    }

    // Undivided, whatever device the job runs on: it may go on on another.
    private static long[] ShapeOf(AdapterTensor tensor) => [Math.Max(1, tensor.Whole.Inner), tensor.Whole.Wide];
}
