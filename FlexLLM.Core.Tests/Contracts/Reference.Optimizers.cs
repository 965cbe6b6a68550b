using FlexLLM.Backends;

namespace FlexLLM.Tests.Contracts;

/// <summary>PyTorch's optimizers, in place.</summary>
internal static partial class Reference
{
    public static void SgdStep(Matrix parameter, Matrix gradient, Matrix? velocity, SgdStepOptions options)
    {
        for (int i = 0; i < parameter.Values.Length; i++)
        {
            ref double p = ref parameter.Values[i];
            double g = gradient.Values[i] + (options.WeightDecay * p);
            if (velocity is not null)
            {
                double v = velocity.Values[i] = (options.Momentum * velocity.Values[i]) + g;
                g = options.Nesterov ? g + (options.Momentum * v) : v;
            }

            p -= options.LearningRate * g;
        }
    }

    public static void AdamWStep(
        Matrix parameter, Matrix gradient, Matrix moment1, Matrix moment2, AdamWStepOptions options)
    {
        double correction1 = 1 - Math.Pow(options.Beta1, options.Step);
        double correction2 = 1 - Math.Pow(options.Beta2, options.Step);
        for (int i = 0; i < parameter.Values.Length; i++)
        {
            ref double p = ref parameter.Values[i];
            double g = gradient.Values[i];
            double m = moment1.Values[i] = (options.Beta1 * moment1.Values[i]) + ((1.0 - options.Beta1) * g);
            double v = moment2.Values[i] = (options.Beta2 * moment2.Values[i]) + ((1.0 - options.Beta2) * g * g);
            p *= 1 - ((double)options.LearningRate * options.WeightDecay);
            p -= options.LearningRate / correction1 * m / ((Math.Sqrt(v) / Math.Sqrt(correction2)) + options.Epsilon);
        }
    }
}
