using FlexLLM.Backends.Cpu;
using FlexLLM.Engine;
using FlexLLM.Models;
using FlexLLM.Tests.Formats;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Engine;

/// <summary>What a saved latency profile belongs to: a shape of model, a backend, limits, and a kind of machine.</summary>
[TestFixture]
internal sealed class HostMachineTests
{
    private const string Epyc =
        """
        processor : 0
        vendor_id : AuthenticAMD
        cpu family : 25
        model : 17
        model name : AMD EPYC
        cpu MHz : 2445.404
        flags : fpu vme: de

        processor : 1
        vendor_id : AuthenticAMD
        cpu family : 25
        model : 17
        model name : AMD EPYC
        cpu MHz : 3100.120

        """;

    private const string Arm =
        """
        processor : 0
        BogoMIPS : 50.00
        CPU implementer : 0x41
        CPU part : 0xd05
        processor : 1
        CPU implementer : 0x41
        CPU part : 0xd0a

        """;

    [Test]
    public void ReadProcessor_KnownFiles_NamesEachKindOnce()
    {
        Assert.That(Read(Epyc), Is.EqualTo("cpu family=25 model=17 model name=AMD EPYC"));
        Assert.That(Read(Arm), Is.EqualTo("CPU implementer=0x41 CPU part=0xd05 CPU part=0xd0a"));
    }

    [Test]
    public void ReadProcessor_AnotherClockRate_IsTheSameMachine() =>
        Assert.That(Read(Epyc.Replace("2445.404", "1500.000", StringComparison.Ordinal)), Is.EqualTo(Read(Epyc)));

    [TestCase("AMD EPYC", "Intel(R) Xeon(R) Processor")]
    [TestCase("model : 17", "model : 1")]
    [TestCase("cpu family : 25", "cpu family : 26")]
    public void ReadProcessor_AnotherProcessor_IsAnotherMachine(string text, string other)
    {
        string changed = Epyc.Replace(text, other, StringComparison.Ordinal);
        Assert.That(changed, Is.Not.EqualTo(Epyc));
        Assert.That(Read(changed), Is.Not.EqualTo(Read(Epyc)));
    }

    [Test]
    public void ReadProcessor_NothingToRead_IsUnknown()
    {
        using var folder = new TempFolder();

        Assert.That(HostMachine.ReadProcessor(folder["none"]), Is.EqualTo("unknown"));
        Assert.That(Read("no: field\nof these"), Is.EqualTo("unknown"));
    }

    [Test]
    public void KeyOf_WhateverAStepsTimeDependsOn_TellsProfilesApart()
    {
        ModelConfig config = TinyModel.ConfigOf(ModelArchitecture.Llama);
        string[] keys =
        [
            Key(config), Key(TinyModel.ConfigOf(ModelArchitecture.Qwen3)), Key(config with { LayerCount = 3 }),
            Key(config with { HiddenSize = 96 }), Key(config with { IntermediateSize = 99 }), Key(config with { KeyValueHeads = 4 }),
            Key(config with { VocabularySize = 301 }), Key(config, type: DType.BF16), Key(config, threads: 2),
            Key(config, options: new CoServingOptions { TokensPerStepMax = 255 }),
            Key(config, options: new CoServingOptions { SequencesMax = 31 }),
        ];

        Assert.That(keys, Is.Unique);
        Assert.That(keys, Has.All.Contain(HostMachine.Name));
        Assert.That(Key(config), Is.EqualTo(keys[0]));
        Assert.That(Key(config, options: new CoServingOptions { Seed = 7, JobsMax = 2 }), Is.EqualTo(keys[0]), "costs no time");
    }

    private static string Key(ModelConfig config, DType type = DType.F32, int threads = 1, CoServingOptions? options = null)
    {
        using var backend = new CpuBackend(threads);
        using LoadedModel model = LoadedModel.CreateEmpty(config, backend, type, config.MaxPositions);
        return LatencyProfileFile.KeyOf(model, options ?? new CoServingOptions());
    }

    private static string Read(string text)
    {
        using var folder = new TempFolder();
        File.WriteAllText(folder["cpuinfo"], text.Replace(" : ", "\t: ", StringComparison.Ordinal)); // As the system writes it.
        return HostMachine.ReadProcessor(folder["cpuinfo"]);
    }
}
