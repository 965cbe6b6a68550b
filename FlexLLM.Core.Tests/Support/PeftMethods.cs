namespace FlexLLM.Tests.Support;

/// <summary>The methods that tests of the compiler and of gradients go through: every network, attachment and module among them.</summary>
internal static class PeftMethods
{
    public static readonly PeftConfig[] All =
    [
        new LoraConfig { Rank = 4, Alpha = 6, TargetModules = PeftConfig.AllModules },
        new LoraConfig { Rank = 3, Alpha = 5, UseRsLora = true, TargetModules = ["down_proj"] },
        new SerialAdapterConfig { Size = 5 },
        new SerialAdapterConfig
        {
            Size = 6,
            Activation = AdapterActivation.Silu,
            TargetModules = ["q_proj", "o_proj", "up_proj", "down_proj"],
        },
        new SerialAdapterConfig { Size = 3, TargetModules = ["k_proj", "v_proj", "gate_proj"] },
        new Ia3Config(),
        new Ia3Config { TargetModules = ["k_proj", "v_proj", "o_proj", "down_proj"], FeedforwardModules = ["o_proj", "down_proj"] },
        new Ia3Config { TargetModules = ["q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], FeedforwardModules = [] },
    ];
}
