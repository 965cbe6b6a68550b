using FlexLLM.Graph;

namespace FlexLLM.Models;

/// <summary>
/// Builds the decoder of LLaMA, Qwen2 and Qwen3 as a parallel computation graph: the only definition of these models. The
/// three differ in biases and in the norms of queries and keys alone. Weight values carry their names in the checkpoint.
/// </summary>
internal static class DecoderBuilder
{
    /// <summary>The model that serves: wherever an adapter may have a network, a place for it.</summary>
    public static ParallelGraph BuildServing(ModelConfig config) => Build(config, bypasses: null);

    /// <summary>The model with these networks, by site (<see cref="AdapterSites.IndexOf"/>), and no others.</summary>
    public static ParallelGraph BuildTraining(ModelConfig config, IReadOnlyDictionary<int, BypassNetwork> bypasses) =>
        Build(config, bypasses);

    private static ParallelGraph Build(ModelConfig config, IReadOnlyDictionary<int, BypassNetwork>? bypasses)
    {
        var graph = new GraphBuilder();
        int table = graph.Weight("model.embed_tokens.weight", config.HiddenSize);
        int x = graph.Activation(OpKind.Embed, "layers.0.input", config.HiddenSize, table);
        for (int layer = 0; layer < config.LayerCount; layer++)
        {
            graph.Layer = layer;
            string next = layer + 1 < config.LayerCount ? $"layers.{layer + 1}.input" : "final.input";
            x = Layer(new LayerBuilder(graph, config, layer, bypasses), x, next);
        }

        graph.Layer = -1;
        int gain = graph.Weight("model.norm.weight", config.HiddenSize);
        int hidden = graph.Activation(OpKind.RmsNorm, "final.norm", config.HiddenSize, x, gain);
        int head = config.TieWordEmbeddings ? table : graph.Weight("lm_head.weight", config.HiddenSize);
        graph.Activation(OpKind.Logits, "logits", config.VocabularySize, hidden, head);
        int loss = graph.Value("loss", ValueKind.Activation, 1);
        int dHidden = graph.Value("d final.norm", ValueKind.Gradient, config.HiddenSize);
        graph.Node(OpKind.CrossEntropy, [hidden, head], [loss, dHidden]);
        return GraphVerifier.Verify(graph.Build());
    }

    private static int Layer(LayerBuilder b, int x, string next)
    {
        ModelConfig config = b.Config;
        int queryColumns = config.AttentionHeads * config.HeadDim;
        int kvColumns = config.KeyValueHeads * config.HeadDim;

        int attentionNorm = b.Norm("attn_norm", "input_layernorm", x);
        int q = b.Linear("q", AdapterModule.QProj, attentionNorm, queryColumns, config.QkvBias);
        int k = b.Linear("k", AdapterModule.KProj, attentionNorm, kvColumns, config.QkvBias);
        int v = b.Linear("v", AdapterModule.VProj, attentionNorm, kvColumns, config.QkvBias);
        if (config.QkNorm)
        {
            q = b.HeadNorm("q_norm", "self_attn.q_norm", q, queryColumns);
            k = b.HeadNorm("k_norm", "self_attn.k_norm", k, kvColumns);
        }

        q = b.Activation(OpKind.Rope, "q_rope", queryColumns, q);
        k = b.Activation(OpKind.Rope, "k_rope", kvColumns, k);
        int heads = b.Attention(q, k, v, queryColumns);
        int o = b.Linear("o", AdapterModule.OProj, heads, config.HiddenSize, config.OutputBias);
        int middle = b.Activation(OpKind.Add, "middle", config.HiddenSize, x, o);

        int mlpNorm = b.Norm("mlp_norm", "post_attention_layernorm", middle);
        int gate = b.Linear("gate", AdapterModule.GateProj, mlpNorm, config.IntermediateSize, config.MlpBias);
        int up = b.Linear("up", AdapterModule.UpProj, mlpNorm, config.IntermediateSize, config.MlpBias);
        int product = b.Activation(OpKind.SiluGate, "act", config.IntermediateSize, gate, up);
        int down = b.Linear("down", AdapterModule.DownProj, product, config.HiddenSize, config.MlpBias);
        return b.Graph.Activation(OpKind.Add, next, config.HiddenSize, middle, down);
    }

    /// <summary>Names and bypasses of one layer. Bypasses are null in the graph that serves.</summary>
    private readonly struct LayerBuilder(
        GraphBuilder graph, ModelConfig config, int layer, IReadOnlyDictionary<int, BypassNetwork>? bypasses)
    {
        public GraphBuilder Graph => graph;

        public ModelConfig Config => config;

        public int Activation(OpKind op, string name, int columns, params int[] inputs) =>
            graph.Activation(op, $"layers.{layer}.{name}", columns, inputs);

        public int Norm(string name, string weight, int x) =>
            Activation(OpKind.RmsNorm, name, config.HiddenSize, x, Weight($"{weight}.weight", config.HiddenSize));

        public int HeadNorm(string name, string weight, int x, int columns) =>
            Activation(OpKind.RmsNorm, name, columns, x, Weight($"{weight}.weight", config.HeadDim));

        /// <summary>
        /// A linear layer with its bypasses: Y = f_B(X) + f_A(X). Values are named alike whether a network stands there or a
        /// place for one: "down.base" is the bare product, "down.around" has what reads the input, "down" all of it.
        /// </summary>
        public int Linear(string name, AdapterModule module, int x, int columns, bool bias)
        {
            string path = AdapterSites.PathOf(module);
            int site = AdapterSites.IndexOf(layer, module);
            BypassNetwork? network = bypasses?.GetValueOrDefault(site);
            bool around = bypasses is null || network?.Attachment == BypassAttachment.Around;
            bool output = bypasses is null || network?.Attachment == BypassAttachment.Output;
            if (AdapterSites.OwnsInput(module) && (bypasses is null || network?.Attachment == BypassAttachment.Input))
            {
                int f = Bypass(site, name, BypassAttachment.Input, network, x, graph[x].Columns);
                x = graph.Activation(OpKind.Add, $"{graph[x].Name}.in", graph[x].Columns, x, f);
            }

            // Before the product, so that its gradient is added to that of the product; a place for one needs the product's rows.
            int early = around && network is not null ? Bypass(site, name, BypassAttachment.Around, network, x, columns) : -1;
            int weight = Weight($"{path}.weight", graph[x].Columns);
            int[] inputs = bias ? [x, weight, Weight($"{path}.bias", columns)] : [x, weight];
            int y = Activation(OpKind.Linear, around || output ? $"{name}.base" : name, columns, inputs);
            if (around)
            {
                int f = early >= 0 ? early : Bypass(site, name, BypassAttachment.Around, null, x, columns);
                y = Activation(OpKind.Add, output ? $"{name}.around" : name, columns, y, f);
            }

            return output
                ? Activation(OpKind.Add, name, columns, y, Bypass(site, name, BypassAttachment.Output, network, y, columns))
                : y;
        }

        private int Bypass(int site, string name, BypassAttachment attachment, BypassNetwork? network, int x, int columns)
        {
            string prefix = $"layers.{layer}.{name}.bypass";
            if (network is not null)
            {
                return new BypassBuilder(graph, site, prefix, AdapterSites.NameOf(site), network, x, columns).Build();
            }

            int f = graph.Value($"{prefix}.{attachment}", ValueKind.Activation, columns);
            graph.Node(new GraphNode(0, OpKind.Bypass, [], [], 0, site) { Attachment = attachment }, OpKind.Bypass, [x], [f]);
            return f;
        }

        public int Attention(int q, int k, int v, int columns)
        {
            int heads = graph.Value($"layers.{layer}.heads", ValueKind.Activation, columns);
            int lse = graph.Value($"layers.{layer}.lse", ValueKind.Activation, config.AttentionHeads);
            graph.Node(OpKind.Attention, [q, k, v], [heads, lse]);
            return heads;
        }

        private int Weight(string name, int columns) => graph.Weight($"model.layers.{layer}.{name}", columns);
    }
}
