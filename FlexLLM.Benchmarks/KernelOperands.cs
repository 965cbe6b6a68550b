using BenchmarkDotNet.Attributes;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Primitives;

namespace FlexLLM.Benchmarks;

/// <summary>A backend and random operands on it, freed after the benchmark.</summary>
public abstract class KernelOperands
{
    private protected const int Hidden = 896;
    private protected const int Intermediate = 4864;
    private protected const int Vocabulary = 32768;

    private readonly List<IDisposable> _owned = [];
    private SeededRandom _random = new(1);

    /// <summary>Rows of the batch: one decoding sequence, a decode batch, a prefill chunk.</summary>
    [Params(1, 16, 256)]
    public int Rows { get; set; }

    private protected IComputeBackend Backend { get; private set; } = null!;

    /// <summary>Makes the backend, then the operands.</summary>
    [GlobalSetup]
    public void Setup()
    {
        Backend = Own(new CpuBackend(Environment.ProcessorCount));
        MakeOperands();
    }

    /// <summary>Frees the operands, and the backend after them.</summary>
    [GlobalCleanup]
    public void Cleanup()
    {
        for (int i = _owned.Count - 1; i >= 0; i--)
        {
            _owned[i].Dispose();
        }

        _owned.Clear();
    }

    private protected abstract void MakeOperands();

    private protected unsafe DeviceWeight Weight(int outFeatures, int inFeatures, DType type)
    {
        float[] values = Floats(outFeatures * inFeatures);
        fixed (float* data = values)
        {
            return Own(Backend.CreateWeight(new HostMatrix((byte*)data, DType.F32, outFeatures, inFeatures), type));
        }
    }

    private protected DeviceTensor Tensor(int rows, int columns)
    {
        DeviceTensor tensor = Own(Backend.Allocate(rows, columns));
        Backend.Upload(Floats(rows * columns), tensor);
        return tensor;
    }

    private protected float[] Floats(int count)
    {
        float[] values = new float[count];
        for (int i = 0; i < count; i++)
        {
            values[i] = _random.NextSingle() - 0.5f;
        }

        return values;
    }

    private protected T Own<T>(T resource)
        where T : IDisposable
    {
        _owned.Add(resource);
        return resource;
    }
}
