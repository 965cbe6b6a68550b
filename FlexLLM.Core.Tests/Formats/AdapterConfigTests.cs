using System.Text;
using System.Text.Json;
using System.Text.Json.Nodes;
using FlexLLM.Formats;
using NUnit.Framework;

namespace FlexLLM.Tests.Formats;

[TestFixture]
internal sealed class AdapterConfigTests
{
    internal const string Plain = """
        {"peft_type":"LORA","r":8,"lora_alpha":16,"target_modules":["q_proj","v_proj"],"lora_dropout":0.05,"bias":"none",
         "base_model_name_or_path":"base","task_type":"CAUSAL_LM","rank_pattern":{},"modules_to_save":[],"use_dora":false}
        """;

    [Test]
    public void Parse_Plain_ReadsEveryField()
    {
        AdapterConfig config = Parse(Plain);
        Assert.That((config.Rank, config.Alpha, config.UseRsLora, config.AllLinear), Is.EqualTo((8, 16.0, false, false)));
        Assert.That((config.Dropout, config.BaseModelNameOrPath), Is.EqualTo((0.05, "base")));
        Assert.That(config.TargetModules, Is.EqualTo(["q_proj", "v_proj"]));
    }

    [TestCase("8", false, 0.5)]
    [TestCase("8", true, 2.0)]
    [TestCase("24.5", false, 1.53125)]
    public void Scale_FollowsTheRule(string alpha, bool rsLora, double scale)
    {
        AdapterConfig config = Edit(json =>
        {
            json["r"] = 16;
            json["lora_alpha"] = JsonNode.Parse(alpha);
            json["use_rslora"] = rsLora;
        });
        Assert.That(config.Scale, Is.EqualTo(scale));
    }

    [Test]
    public void Parse_StringTargets_AreNamesOrAllLinear()
    {
        Assert.That(Edit(json => json["target_modules"] = "down_proj").TargetModules, Is.EqualTo(["down_proj"]));
        AdapterConfig all = Edit(json => json["target_modules"] = "all-linear");
        Assert.That((all.AllLinear, all.TargetModules.Count), Is.EqualTo((true, 0)));
    }

    [TestCase("peft_type", null, "is missing")]
    [TestCase("peft_type", "\"LOHA\"", "'LOHA' is not supported; LORA, IA3, BOTTLENECK are")]
    [TestCase("task_type", "\"SEQ_CLS\"", "'SEQ_CLS' is not supported")]
    [TestCase("bias", "\"all\"", "'all' is not supported; only 'none' is")]
    [TestCase("r", null, "is missing")]
    [TestCase("r", "0", "between 1 and 4096")]
    [TestCase("r", "8.5", "must be an integer")]
    [TestCase("lora_alpha", null, "is missing")]
    [TestCase("lora_alpha", "\"16\"", "must be a number, not a string")]
    [TestCase("lora_alpha", "1e999", "must lie between")]
    [TestCase("lora_dropout", "1.5", "must lie between")]
    [TestCase("use_rslora", "3", "must be true or false")]
    [TestCase("base_model_name_or_path", "3", "must be a string")]
    [TestCase("target_modules", null, "is missing")]
    [TestCase("target_modules", "[]", "is empty")]
    [TestCase("target_modules", "3", "must be a list of strings, not a number")]
    [TestCase("target_modules", "\".*_proj$\"", "patterns are not supported")]
    [TestCase("target_modules", "\"\"", "patterns are not supported")]
    [TestCase("use_dora", "true", "is set, but")]
    [TestCase("fan_in_fan_out", "true", "is set, but")]
    [TestCase("lora_bias", "true", "is set, but")]
    [TestCase("use_qalora", "true", "is set, but")]
    [TestCase("modules_to_save", "[\"lm_head\"]", "is set, but")]
    [TestCase("rank_pattern", "{\"q_proj\":4}", "is set, but")]
    [TestCase("alpha_pattern", "{\"q_proj\":4}", "is set, but")]
    [TestCase("layers_to_transform", "0", "is set, but")]
    [TestCase("layers_to_transform", "[0,1]", "is set, but")]
    [TestCase("layers_pattern", "\"layers\"", "is set, but")]
    [TestCase("layer_replication", "[[0,4]]", "is set, but")]
    [TestCase("exclude_modules", "[\"q_proj\"]", "is set, but")]
    [TestCase("target_parameters", "[\"experts\"]", "is set, but")]
    [TestCase("trainable_token_indices", "[1]", "is set, but")]
    public void Parse_BadField_NamesIt(string name, string? value, string fault)
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(() => Edit(json =>
        {
            json.Remove(name);
            if (value is not null)
            {
                json[name] = JsonNode.Parse(value);
            }
        }))!;
        Assert.That((e.File, e.Field), Is.EqualTo(("adapter_config.json", name)));
        Assert.That(e.Fault, Does.Contain(fault));
    }

    [TestCase("", "is not a module name")]
    [TestCase("a b", "is not a module name")]
    [TestCase("q_proj", "'q_proj' is listed twice")]
    public void Parse_BadTargetInList_NamesItsIndex(string target, string fault)
    {
        InvalidFileException e = Assert.Throws<InvalidFileException>(
            () => Edit(json => json["target_modules"] = new JsonArray("q_proj", target)))!;
        Assert.That(e.Field, Is.EqualTo("target_modules[1]"));
        Assert.That(e.Fault, Does.Contain(fault));
    }

    [Test]
    public void Save_ThenLoad_IsTheSame([Values] bool allLinear)
    {
        using var folder = new TempFolder();
        var config = new AdapterConfig
        {
            Rank = 4,
            Alpha = 12.5,
            UseRsLora = true,
            TargetModules = allLinear ? [] : ["o_proj", "up_proj"],
            AllLinear = allLinear,
            Dropout = 0.1,
            BaseModelNameOrPath = null,
        };
        config.Save(folder.Path);
        AdapterConfig back = AdapterConfig.Load(folder.Path);
        Assert.That(back.TargetModules, Is.EqualTo(config.TargetModules));
        Assert.That(back with { TargetModules = config.TargetModules }, Is.EqualTo(config));
    }

    [Test]
    public void Write_WhatPeftWrote_GivesTheSameJson(
        [Values("tiny-llama", "tiny-qwen2", "tiny-qwen3")] string model, [Values("all", "down_proj")] string adapter)
    {
        string path = SharedData.Require("golden", model, $"adapter-{adapter}", AdapterConfig.FileName);
        using var folder = new TempFolder();
        AdapterConfig.Load(path).Save(folder.Path);
        JsonElement theirs = JsonElement.Parse(File.ReadAllBytes(path));
        JsonElement ours = JsonElement.Parse(File.ReadAllBytes(folder[AdapterConfig.FileName]));
        Assert.That(JsonElement.DeepEquals(ours, theirs));
        Assert.That(ours.EnumerateObject().Select(member => member.Name),
            Is.EqualTo(theirs.EnumerateObject().Select(member => member.Name)));
    }

    private static AdapterConfig Parse(string json) => AdapterConfig.Parse(Encoding.UTF8.GetBytes(json), "adapter_config.json");

    private static AdapterConfig Edit(Action<JsonObject> edit)
    {
        JsonObject json = JsonNode.Parse(Plain)!.AsObject();
        edit(json);
        return Parse(json.ToJsonString());
    }
}
