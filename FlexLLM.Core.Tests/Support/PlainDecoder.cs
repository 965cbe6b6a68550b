using FlexLLM.Tests.Contracts;

namespace FlexLLM.Tests.Support;

/// <summary>
/// The decoders with an adapter of any method, in double, from nothing but the tensors of the two files: what a forward pass must
/// compute, and what gradients are the derivatives of. It shares no line with the graph; it knows no batch, no window, no cache.
/// </summary>
/// <param name="config">Shape of the model.</param>
/// <param name="weights">Tensors of the checkpoint by name; vectors are one row.</param>
internal sealed class PlainDecoder(ModelConfig config, IReadOnlyDictionary<string, Matrix> weights)
{
    /// <summary>The tensors of a file of F32 values.</summary>
    public static Dictionary<string, Matrix> Read(string path) => Weights.Read(path).ToDictionary(
        t => t.Key,
        t => Matrix.FromFloats(t.Value.Shape.Length == 1 ? 1 : (int)t.Value.Shape[0], (int)t.Value.Shape[^1], t.Value.Values));

    /// <summary>Logits [ids, vocabulary].</summary>
    /// <param name="ids">A sequence from its first token on.</param>
    /// <param name="method">The adapter's method, or null for the bare model.</param>
    /// <param name="adapter">The adapter's tensors under the names of a PEFT folder.</param>
    public Matrix Logits(int[] ids, PeftConfig? method = null, IReadOnlyDictionary<string, Matrix>? adapter = null)
    {
        Matrix x = Reference.Gather(weights["model.embed_tokens.weight"], ids);
        for (int layer = 0; layer < config.LayerCount; layer++)
        {
            x = Layer(new Modules(this, layer, method, adapter ?? new Dictionary<string, Matrix>()), layer, x);
        }

        Matrix head = weights[config.TieWordEmbeddings ? "model.embed_tokens.weight" : "lm_head.weight"];
        return Reference.Linear(Norm(x, "model.norm"), head);
    }

    /// <summary>Mean cross-entropy of each token but the first.</summary>
    public double Loss(int[] ids, PeftConfig method, IReadOnlyDictionary<string, Matrix> adapter)
    {
        Matrix logits = Logits(ids, method, adapter);
        double sum = 0;
        for (int row = 0; row + 1 < ids.Length; row++)
        {
            double[] values = logits.Slice(row, 1).Values;
            double max = values.Max();
            sum += max + Math.Log(values.Sum(v => Math.Exp(v - max))) - values[ids[row + 1]];
        }

        return sum / (ids.Length - 1);
    }

    private Matrix Layer(Modules modules, int layer, Matrix x)
    {
        string prefix = $"model.layers.{layer}";
        Matrix normed = Norm(x, $"{prefix}.input_layernorm");
        Matrix q = modules.Apply("self_attn.q_proj", normed);
        Matrix k = modules.Apply("self_attn.k_proj", normed);
        Matrix v = modules.Apply("self_attn.v_proj", normed);
        if (config.Architecture == ModelArchitecture.Qwen3)
        {
            q = Norm(q, $"{prefix}.self_attn.q_norm");
            k = Norm(k, $"{prefix}.self_attn.k_norm");
        }

        var heads = new HeadShape(config.KeyValueHeads, config.AttentionHeads / config.KeyValueHeads, config.HeadDim);
        Matrix o = modules.Apply("self_attn.o_proj", Reference.Attention(Rotated(q), Rotated(k), v, 0, heads).O);
        Matrix middle = x.Plus(o);
        normed = Norm(middle, $"{prefix}.post_attention_layernorm");
        Matrix act = Reference.SiluGate(modules.Apply("mlp.gate_proj", normed), modules.Apply("mlp.up_proj", normed));
        return middle.Plus(modules.Apply("mlp.down_proj", act));
    }

    private Matrix Norm(Matrix x, string name) => Reference.RmsNorm(x, weights[$"{name}.weight"], config.RmsNormEpsilon);

    // Within a head, element i turns with element i + d/2 by position * theta^(-2i/d).
    private Matrix Rotated(Matrix x)
    {
        int half = config.HeadDim / 2;
        var y = new Matrix(x.Rows, x.Columns);
        for (int row = 0; row < x.Rows; row++)
        {
            for (int head = 0; head < x.Columns; head += config.HeadDim)
            {
                for (int i = 0; i < half; i++)
                {
                    (double sin, double cos) = Math.SinCos(row * Math.Pow(config.RopeTheta, -2.0 * i / config.HeadDim));
                    (double a, double b) = (x[row, head + i], x[row, head + half + i]);
                    (y[row, head + i], y[row, head + half + i]) = ((a * cos) - (b * sin), (b * cos) + (a * sin));
                }
            }
        }

        return y;
    }

    /// <summary>The linear modules of one layer as the papers of the methods define them.</summary>
    private readonly struct Modules(
        PlainDecoder model, int layer, PeftConfig? method, IReadOnlyDictionary<string, Matrix> adapter)
    {
        public Matrix Apply(string path, Matrix x)
        {
            string name = path.Split('.')[1];
            string module = $"model.layers.{layer}.{path}";
            bool adapts = method is not null && method.TargetModules.Contains(name);
            bool scalesInput = adapts && method is Ia3Config ia3 && ia3.FeedforwardModules.Contains(name);
            Matrix? vector = adapts && method is Ia3Config ? adapter[$"base_model.model.{module}.ia3_l"] : null;
            if (scalesInput)
            {
                x = Scaled(x, vector!);
            }

            Matrix y = Reference.Linear(x, model.Weight($"{module}.weight")!, model.Weight($"{module}.bias"));
            if (!adapts || scalesInput)
            {
                return y;
            }

            string prefix = $"base_model.model.{module}";
            switch (method)
            {
                case LoraConfig lora:
                    double scale = lora.Alpha / (lora.UseRsLora ? Math.Sqrt(lora.Rank) : lora.Rank);
                    Matrix u = Reference.Linear(x, adapter[$"{prefix}.lora_A.weight"]);
                    return y.Plus(Reference.Linear(u, adapter[$"{prefix}.lora_B.weight"]).Map(value => scale * value));
                case SerialAdapterConfig serial:
                    Matrix z = Reference.Linear(y, adapter[$"{prefix}.adapter_down.weight"], adapter[$"{prefix}.adapter_down.bias"]);
                    Matrix h = z.Map(value => serial.Activation == AdapterActivation.Relu
                        ? Math.Max(value, 0) : value / (1 + Math.Exp(-value)));
                    return y.Plus(Reference.Linear(h, adapter[$"{prefix}.adapter_up.weight"], adapter[$"{prefix}.adapter_up.bias"]));
                default:
                    return Scaled(y, vector!);
            }
        }

        // The vector of a file is [n, 1] or [1, n].
        private static Matrix Scaled(Matrix x, Matrix vector)
        {
            Matrix y = x.Copy();
            for (int row = 0; row < x.Rows; row++)
            {
                for (int c = 0; c < x.Columns; c++)
                {
                    y[row, c] *= vector.Values[c];
                }
            }

            return y;
        }
    }

    private Matrix? Weight(string name) => weights.GetValueOrDefault(name);
}
