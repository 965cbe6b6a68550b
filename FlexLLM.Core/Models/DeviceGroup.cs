using FlexLLM.Backends;
using FlexLLM.Backends.Group;
using FlexLLM.Formats;
using FlexLLM.Graph.Parallelization;

namespace FlexLLM.Models;

/// <summary>
/// A tensor-parallel group in one process: a part of the model on each rank's own device. What one device does in a call, a
/// group does in the same call made by every rank's thread.
/// </summary>
internal sealed class DeviceGroup : IDisposable
{
    private readonly InProcessGroup _group;
    private readonly LoadedModel?[] _models;

    private DeviceGroup(IReadOnlyList<IComputeBackend> backends)
    {
        _group = new InProcessGroup(backends);
        _models = new LoadedModel?[backends.Count];
    }

    public int Ranks => _models.Length;

    /// <summary>A rank's part of the model.</summary>
    public LoadedModel this[int rank] => _models[rank]!;

    /// <summary>Reads each rank's part of a checkpoint onto its device.</summary>
    /// <param name="checkpoint">The open checkpoint.</param>
    /// <param name="config">Its config.</param>
    /// <param name="backends">A device a rank; they stay the caller's and outlive the group.</param>
    /// <param name="positionsMax">Longest sequence.</param>
    /// <param name="plans">Chooses the plan of an adapter's network by its tap.</param>
    /// <exception cref="RequestRejectedException">The number of devices does not divide the model.</exception>
    /// <exception cref="InvalidFileException">A tensor is missing, misshapen, or not finite.</exception>
    public static DeviceGroup Load(
        SafetensorsCheckpoint checkpoint, ModelConfig config, IReadOnlyList<IComputeBackend> backends, int positionsMax,
        Func<BypassTap, Bypass, BypassPlan> plans)
    {
        ModelShard.LocalConfig(config, backends.Count);
        var group = new DeviceGroup(backends);
        try
        {
            for (int rank = 0; rank < backends.Count; rank++)
            {
                var shard = new ModelShard(group._group[rank], plans);
                group._models[rank] = LoadedModel.Load(
                    checkpoint, config, backends[rank], weightType: null, positionsMax, shard: shard);
            }

            return group;
        }
        catch
        {
            group.Dispose();
            throw;
        }
    }

    /// <summary>
    /// Runs a body once for each rank, all at the same time; they meet in collectives. An exception on one rank ends all.
    /// </summary>
    public void Run(Action<LoadedModel> body) => _group.Run(communicator => body(this[communicator.Rank]));

    public void Dispose()
    {
        foreach (LoadedModel? model in _models)
        {
            model?.Dispose();
        }

        _group.Dispose();
    }
}
