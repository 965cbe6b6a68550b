using System.Runtime.InteropServices;
using FlexLLM.Backends;
using FlexLLM.Backends.Cpu;
using FlexLLM.Backends.Group;
using NUnit.Framework;

namespace FlexLLM.Tests.Contracts;

/// <summary>A group of devices is a device: where every rank has the same, it does what one would, with the same bits.</summary>
[TestFixture]
internal sealed class GroupBackendContractTests : DeterministicBackendContract
{
    protected override int Devices => 2;

    protected override IComputeBackend CreateBackend(int threads) =>
        new Compared(new GroupBackend([new CpuBackend(threads), new CpuBackend(threads)]));

    /// <summary>Whatever is read, every rank has.</summary>
    private sealed class Compared(GroupBackend group) : DelegatingBackend(group)
    {
        public override void Download(TensorSlice source, Span<float> destination)
        {
            base.Download(source, destination);
            float[] other = new float[destination.Length];
            foreach (GroupRank rank in group.Settle())
            {
                rank.Device.Download(rank.Of(source), other);
                Assert.That(MemoryMarshal.AsBytes<float>(other).SequenceEqual(MemoryMarshal.AsBytes(destination)), $"rank {rank.Index}");
            }
        }
    }
}
