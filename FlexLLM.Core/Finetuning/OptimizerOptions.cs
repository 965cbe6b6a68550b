using System.Globalization;

namespace FlexLLM;

/// <summary>How adapter weights are updated after each group of samples.</summary>
public abstract record OptimizerOptions
{
    /// <summary>Step size, a positive number.</summary>
    public float LearningRate { get; init; } = 1e-3f;

    /// <summary>Weight decay: decoupled in AdamW, added to the gradient in SGD. Not negative.</summary>
    public float WeightDecay { get; init; }

    /// <summary>Tensors kept beside each weight.</summary>
    internal abstract int Moments { get; }

    /// <summary>All hyper-parameters, written the same way under every culture.</summary>
    internal abstract string Describe();

    internal virtual void Validate()
    {
        Require(float.IsFinite(LearningRate) && LearningRate > 0, nameof(LearningRate), "must be a positive number");
        Require(float.IsFinite(WeightDecay) && WeightDecay >= 0, nameof(WeightDecay), "must not be negative");
    }

    /// <summary>Throws <see cref="RequestRejectedException"/> naming the property when the condition does not hold.</summary>
    private protected static void Require(bool condition, string property, string rule)
    {
        if (!condition)
        {
            throw new RequestRejectedException($"Optimizer.{property} {rule}.");
        }
    }
}

/// <summary>PyTorch's SGD with momentum and Nesterov's variant.</summary>
public sealed record SgdOptions : OptimizerOptions
{
    /// <summary>Momentum factor in [0, 1).</summary>
    public float Momentum { get; init; }

    /// <summary>Nesterov momentum; needs <see cref="Momentum"/> above zero.</summary>
    public bool Nesterov { get; init; }

    internal override int Moments => Momentum > 0 ? 1 : 0;

    internal override string Describe() => string.Create(
        CultureInfo.InvariantCulture, $"sgd lr={LearningRate:R} decay={WeightDecay:R} momentum={Momentum:R} nesterov={Nesterov}");

    internal override void Validate()
    {
        base.Validate();
        Require(Momentum is >= 0 and < 1, nameof(Momentum), "must be in [0, 1)");
        Require(!Nesterov || Momentum > 0, nameof(Nesterov), "needs Momentum above 0");
    }
}

/// <summary>AdamW: Adam with decoupled weight decay.</summary>
public sealed record AdamWOptions : OptimizerOptions
{
    /// <summary>Decay of the first moment, in [0, 1).</summary>
    public float Beta1 { get; init; } = 0.9f;

    /// <summary>Decay of the second moment, in [0, 1).</summary>
    public float Beta2 { get; init; } = 0.999f;

    /// <summary>Added to the root of the second moment, positive.</summary>
    public float Epsilon { get; init; } = 1e-8f;

    internal override int Moments => 2;

    internal override string Describe() => string.Create(
        CultureInfo.InvariantCulture,
        $"adamw lr={LearningRate:R} decay={WeightDecay:R} beta1={Beta1:R} beta2={Beta2:R} epsilon={Epsilon:R}");

    internal override void Validate()
    {
        base.Validate();
        Require(Beta1 is >= 0 and < 1, nameof(Beta1), "must be in [0, 1)");
        Require(Beta2 is >= 0 and < 1, nameof(Beta2), "must be in [0, 1)");
        Require(float.IsFinite(Epsilon) && Epsilon > 0, nameof(Epsilon), "must be a positive number");
    }
}
