using FlexLLM.Primitives;
using TorchSharp;
using Tensor = TorchSharp.torch.Tensor;

namespace FlexLLM.Backends.Torch;

/// <summary>PyTorch's rules, written out; what does not depend on the element is computed in double on the host.</summary>
internal static class OptimizerOps
{
    /// <summary>Temporaries of a step in bytes: the decayed gradient and what momentum makes of it.</summary>
    public static long ScratchBytes(long elements) => 2 * sizeof(float) * elements;

    public static void Sgd(DeviceTensor parameter, DeviceTensor gradient, DeviceTensor? velocity, in SgdStepOptions options)
    {
        CheckSame(parameter, gradient);
        if (velocity is not null)
        {
            CheckSame(parameter, velocity);
        }

        using DisposeScope scope = torch.NewDisposeScope();
        using Scalar decay = TorchContext.Passing(options.WeightDecay);
        using Scalar momentum = TorchContext.Passing(options.Momentum);
        using Scalar step = TorchContext.Passing(-options.LearningRate);
        Tensor p = TorchContext.Of(parameter);
        Tensor g = TorchContext.Of(gradient);
        if (options.WeightDecay != 0)
        {
            g = g.add(p, decay);
        }

        if (velocity is not null)
        {
            Tensor v = TorchContext.Of(velocity).mul_(momentum).add_(g);
            g = options.Nesterov ? g.add(v, momentum) : v;
        }

        p.add_(g, step);
    }

    public static void AdamW(
        DeviceTensor parameter, DeviceTensor gradient, DeviceTensor moment1, DeviceTensor moment2, in AdamWStepOptions options)
    {
        CheckSame(parameter, gradient);
        CheckSame(parameter, moment1);
        CheckSame(parameter, moment2);
        double correction1 = 1.0 - Math.Pow(options.Beta1, options.Step);
        double correction2 = 1.0 - Math.Pow(options.Beta2, options.Step);
        using DisposeScope scope = torch.NewDisposeScope();
        using Scalar keep1 = TorchContext.Passing(options.Beta1);
        using Scalar keep2 = TorchContext.Passing(options.Beta2);
        using Scalar take1 = TorchContext.Passing(1.0 - options.Beta1);
        using Scalar take2 = TorchContext.Passing(1.0 - options.Beta2);
        using Scalar decay = TorchContext.Passing(1.0 - ((double)options.LearningRate * options.WeightDecay));
        using Scalar widen = TorchContext.Passing(1.0 / Math.Sqrt(correction2));
        using Scalar epsilon = TorchContext.Passing(options.Epsilon);
        using Scalar step = TorchContext.Passing(-options.LearningRate / correction1);
        Tensor g = TorchContext.Of(gradient);
        Tensor m = TorchContext.Of(moment1).mul_(keep1).add_(g, take1);
        Tensor v = TorchContext.Of(moment2).mul_(keep2).addcmul_(g, g, take2);
        Tensor denominator = v.sqrt().mul_(widen).add_(epsilon);
        TorchContext.Of(parameter).mul_(decay).addcdiv_(m, denominator, step);
    }

    private static void CheckSame(DeviceTensor a, DeviceTensor b) => Check.That(a.Rows == b.Rows && a.Columns == b.Columns);
}
