using FlexLLM.Backends;
using FlexLLM.Backends.Torch;
using FlexLLM.Tests.Contracts;
using NUnit.Framework;
using TorchSharp;

namespace FlexLLM.Tests;

/// <summary>The same with temporaries of a few rows: pieces of windows, logits and copies fit together.</summary>
[TorchFixture]
internal sealed class TorchSmallPiecesContractTests : BackendContract
{
    private const long ElementsMax = 300;

    [Test]
    public void Context_Rows_ComeInPieces()
    {
        using var context = new TorchContext(new torch.Device(DeviceType.CPU), ElementsMax);
        int[] rows = [context.RowsPerPiece(83), context.RowsPerPiece(4 * 130), context.RowsPerPiece(0)];
        Assert.That(rows, Is.EqualTo(new[] { 3, 1, 300 }));
    }

    protected override IComputeBackend CreateBackend() => new TorchComputeBackend(new torch.Device(DeviceType.CPU), ElementsMax);
}
