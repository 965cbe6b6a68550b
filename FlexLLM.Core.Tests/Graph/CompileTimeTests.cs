using System.Diagnostics;
using FlexLLM.Graph;
using FlexLLM.Models;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Graph;

/// <summary>Compiling grows with the layers and no faster. Times are reported; what is asserted is generous.</summary>
[TestFixture]
internal sealed class CompileTimeTests
{
    [Test]
    public void CompileTraining_TwiceTheLayers_TakesAboutTwiceTheTime()
    {
        Func<double> forty = Compiling(40);
        Func<double> eighty = Compiling(80);
        double ratio = double.PositiveInfinity;
        for (int i = 0; i < 12; i++)
        {
            ratio = Math.Min(ratio, eighty() / forty()); // Side by side: others share the machine, and not evenly.
        }

        TestContext.Out.WriteLine($"80 layers take {ratio:F2} times as long as 40");
        Assert.That(ratio, Is.LessThan(3), "a pass that is quadratic in layers takes four times as long");
    }

    [Test]
    public void CompileTraining_TwiceTheLayers_AllocatesTwiceTheBytes(
        [ValueSource(typeof(PeftMethods), nameof(PeftMethods.All))] PeftConfig method)
    {
        foreach (long? budget in new long?[] { null, 0 })
        {
            double ratio = (double)AllocatedBytes(method, 80, budget) / AllocatedBytes(method, 40, budget);
            Assert.That(ratio, Is.InRange(1.8, 2.2), $"budget {budget}");
        }
    }

    // What a pass does for a layer shows in what it allocates; unlike times, bytes are the same on every machine.
    private static long AllocatedBytes(PeftConfig method, int layers, long? budget)
    {
        ModelConfig config = ModelShapes.Of("llama-3.1-70b") with { LayerCount = layers };
        var compiler = new GraphCompiler(DecoderBuilder.BuildServing(config), layers);
        var options = new CompilerOptions { Rematerialization = new RematerializationOptions { SavedColumnsMax = budget } };
        long before = GC.GetAllocatedBytesForCurrentThread();
        compiler.CompileTraining(TrainingGraphs.Of(config, method), options);
        return GC.GetAllocatedBytesForCurrentThread() - before;
    }

    // Compiles once for each call and tells how many milliseconds it took.
    private static Func<double> Compiling(int layers)
    {
        ModelConfig config = ModelShapes.Of("llama-3.1-70b") with { LayerCount = layers };
        var compiler = new GraphCompiler(DecoderBuilder.BuildServing(config), layers);
        return () =>
        {
            long start = Stopwatch.GetTimestamp();
            compiler.CompileTraining(TrainingGraphs.Lora(config, AdapterModule.DownProj));
            return Stopwatch.GetElapsedTime(start).TotalMilliseconds;
        };
    }
}
