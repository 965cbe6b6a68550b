using FlexLLM.Adapters;
using FlexLLM.Formats;

namespace FlexLLM;

/// <summary>A loaded adapter.</summary>
/// <param name="Name">Name that requests use.</param>
/// <param name="Version">Number of the version that new requests get, counted from 1.</param>
/// <param name="Config">Its shape.</param>
public sealed record AdapterInfo(string Name, int Version, PeftConfig Config);

/// <summary>
/// The adapters of an engine. Every call takes effect between two steps; requests in flight keep the version they have.
/// </summary>
public sealed class AdapterManager
{
    private readonly CoServingEngine _engine;

    internal AdapterManager(CoServingEngine engine) => _engine = engine;

    /// <summary>Makes a new adapter that answers like the bare model (B is zero) until it is trained.</summary>
    /// <exception cref="RequestRejectedException">The config does not fit the model or the device, or the name is taken.</exception>
    public Task<AdapterInfo> CreateAsync(string name, PeftConfig config, ulong seed = 0, CancellationToken cancellationToken = default)
    {
        ArgumentException.ThrowIfNullOrWhiteSpace(name);
        ArgumentNullException.ThrowIfNull(config);
        PeftAdapter.Validate(config, _engine.Config);
        config = config with { TargetModules = [.. config.TargetModules] };
        return _engine.CallAsync(
            loop =>
            {
                if (loop.Adapters.Contains(name))
                {
                    throw new RequestRejectedException($"Adapter '{name}' exists already.");
                }

                loop.RequireRoom(name, config);
                PeftAdapter adapter = PeftAdapter.CreateRandom(loop.Model.Backend, loop.Model.Whole, config, seed, loop.Model.Shard);
                return InfoOf(name, loop.Adapters.Publish(name, adapter));
            },
            cancellationToken);
    }

    /// <summary>
    /// Loads a PEFT folder under a name; a loaded adapter of that name gets it as its next version. A name that a job trains is
    /// refused.
    /// </summary>
    /// <exception cref="InvalidFileException">Malformed files, or an adapter that does not fit the model.</exception>
    /// <exception cref="RequestRejectedException">The device has no room for it, or the name is in training.</exception>
    public Task<AdapterInfo> LoadAsync(string name, string folder, CancellationToken cancellationToken = default)
    {
        ArgumentException.ThrowIfNullOrWhiteSpace(name);
        ArgumentException.ThrowIfNullOrEmpty(folder);
        return _engine.CallAsync(
            loop =>
            {
                loop.Jobs.RequireNotTrained(name);
                loop.RequireRoom(name, PeftFolder.ReadConfig(folder, loop.Model.Whole));
                return InfoOf(name, loop.Adapters.Publish(name, PeftFolder.Load(folder, loop.Model)));
            },
            cancellationToken);
    }

    /// <summary>Writes the newest version as a PEFT folder: adapter_config.json and adapter_model.safetensors.</summary>
    public async Task SaveAsync(string name, string folder, CancellationToken cancellationToken = default)
    {
        ArgumentException.ThrowIfNullOrWhiteSpace(name);
        ArgumentException.ThrowIfNullOrEmpty(folder);
        (PeftConfig config, IReadOnlyList<TensorToWrite> tensors) = await _engine.CallAsync(
            loop =>
            {
                PeftAdapter weights = loop.Adapters.Get(name).Weights;
                return (weights.Config, PeftFolder.Download(weights, loop.Model.Backend));
            },
            cancellationToken).ConfigureAwait(false);
        await Task.Run(() => PeftFolder.Save(folder, config, tensors, _engine.ModelFolder), cancellationToken).ConfigureAwait(false);
    }

    /// <summary>
    /// Takes an adapter out of service; one that a job trains is refused. Its memory is freed once the last request on it has
    /// ended.
    /// </summary>
    public Task UnloadAsync(string name, CancellationToken cancellationToken = default)
    {
        ArgumentException.ThrowIfNullOrWhiteSpace(name);
        return _engine.CallAsync(
            loop =>
            {
                loop.Jobs.RequireNotTrained(name);
                loop.Adapters.Remove(name);
                return true;
            },
            cancellationToken);
    }

    /// <summary>Gives an adapter another name; one that a job trains is refused.</summary>
    public Task RenameAsync(string name, string newName, CancellationToken cancellationToken = default)
    {
        ArgumentException.ThrowIfNullOrWhiteSpace(name);
        ArgumentException.ThrowIfNullOrWhiteSpace(newName);
        return _engine.CallAsync(
            loop =>
            {
                loop.Jobs.RequireNotTrained(name);
                loop.Jobs.RequireNotTrained(newName);
                loop.Adapters.Rename(name, newName);
                return true;
            },
            cancellationToken);
    }

    /// <summary>The loaded adapters, by name.</summary>
    public Task<IReadOnlyList<AdapterInfo>> ListAsync(CancellationToken cancellationToken = default) =>
        _engine.CallAsync<IReadOnlyList<AdapterInfo>>(
            loop => [.. loop.Adapters.Names.Zip(loop.Adapters.Versions, InfoOf)], cancellationToken);

    private static AdapterInfo InfoOf(string name, AdapterVersion version) => new(name, version.Number, version.Weights.Config);
}
