using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>
/// Reads the tensors of another libtorch device. Everything that a device does is on its one default stream, in the order of the calls,
/// whichever thread makes them: TorchSharp's managed API knows no other stream. A copy between two GPUs runs on the source's stream,
/// which first waits for the destination's; the destination's then waits for the copy, both by events and not on the host. So what the
/// source's thread called for before the threads met is read, what it calls for after they met again waits for the reading, and
/// memory that is given back meanwhile is handed out again on the same stream. The host waits for nothing.
/// </summary>
/// <remarks>
/// A sum brings its operand over first: a temporary of a rank's share of some rows or of a gradient, less than what operations element
/// by element, or an optimizer, have room for. Copies go to their place at once, but for those of
/// columns between GPUs that cannot read each other's memory, which libtorch makes by way of one more such share on either.
/// </remarks>
internal static class PeerOps
{
    public static void Read(
        TorchContext context, TensorSlice source, Rectangle from, TensorSlice destination, Rectangle to, bool accumulate)
    {
        Rectangle.CheckPair(
            from, (long)source.Rows * source.Columns, to, (long)destination.Rows * destination.Columns);
        if (from.IsEmpty)
        {
            return;
        }

        using DisposeScope scope = torch.NewDisposeScope();
        Tensor values = TorchContext.ToRead(source, from);
        if (accumulate && !context.OnHost)
        {
            values = values.to(context.Device);
        }

        TorchContext.Store(values, TorchContext.Of(destination, to), accumulate);
    }
}
