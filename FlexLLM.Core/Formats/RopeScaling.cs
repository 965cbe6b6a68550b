namespace FlexLLM;

/// <summary>How rotary frequencies are stretched for longer contexts.</summary>
public enum RopeScalingKind
{
    /// <summary>Every frequency is divided by the factor.</summary>
    Linear,

    /// <summary>LLaMA 3.1: low frequencies are divided by the factor, high ones kept, those between interpolated.</summary>
    Llama3,
}

/// <summary>Rotary scaling of a model ("rope_scaling" of config.json). A model without scaling has no such record.</summary>
public sealed record RopeScaling
{
    /// <summary>The rule.</summary>
    public required RopeScalingKind Kind { get; init; }

    /// <summary>How many times longer the context becomes, at least 1.</summary>
    public required double Factor { get; init; }

    /// <summary>Llama3: wavelengths longer than the original context divided by this are scaled in full.</summary>
    public double LowFrequencyFactor { get; init; } = 1;

    /// <summary>Llama3: wavelengths shorter than the original context divided by this are kept. Above the low factor.</summary>
    public double HighFrequencyFactor { get; init; } = 4;

    /// <summary>Llama3: context length, in tokens, before scaling.</summary>
    public int OriginalMaxPositions { get; init; } = 8192;

    /// <summary>The scaled value of one inverse frequency (radians per position), in double.</summary>
    internal double Apply(double inverseFrequency)
    {
        if (Kind == RopeScalingKind.Linear)
        {
            return inverseFrequency / Factor;
        }

        double wavelength = 2 * Math.PI / inverseFrequency;
        if (wavelength > OriginalMaxPositions / LowFrequencyFactor)
        {
            return inverseFrequency / Factor;
        }

        if (wavelength < OriginalMaxPositions / HighFrequencyFactor)
        {
            return inverseFrequency;
        }

        double smooth = ((OriginalMaxPositions / wavelength) - LowFrequencyFactor) / (HighFrequencyFactor - LowFrequencyFactor);
        return ((1 - smooth) * inverseFrequency / Factor) + (smooth * inverseFrequency);
    }
}
