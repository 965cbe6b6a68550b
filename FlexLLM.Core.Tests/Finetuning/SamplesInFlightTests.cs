using System.Runtime.InteropServices;
using FlexLLM.Adapters;
using FlexLLM.Backends;
using FlexLLM.Execution;
using FlexLLM.Finetuning;
using FlexLLM.Models;
using FlexLLM.Primitives;
using FlexLLM.Tests.Support;
using NUnit.Framework;

namespace FlexLLM.Tests.Finetuning;

/// <summary>A sample's forward pass beside the backward pass of the one before it changes no bit of what is learnt.</summary>
[DeviceFixture]
internal sealed class SamplesInFlightTests
{
    private const int RowsMax = 64;
    private static readonly int[] Lengths = [5, 23, 2, 40, 17, 9, 31];

    private TinyModel _files = null!;
    private IComputeBackend _backend = null!;
    private LoadedModel _model = null!;

    [OneTimeSetUp]
    public void SetUp()
    {
        _files = new TinyModel(ModelArchitecture.Qwen2);
        _backend = TestDevice.CreateBackend(1);
        _model = _files.Load(_backend);
    }

    [OneTimeTearDown]
    public void TearDown()
    {
        _model.Dispose();
        _backend.Dispose();
        _files.Dispose();
    }

    [Test]
    [ManagedOnly("bits do not depend on how windows are cut")]
    public void Ahead_AnyInterleaving_LearnsTheSameBits([Values(2, 3, 7)] int accumulation)
    {
        Outcome plain = Train(accumulation, seed: null);
        for (ulong seed = 1; seed <= 8; seed++)
        {
            Outcome ahead = Train(accumulation, seed);
            Assert.That(ahead.WindowsAhead, Is.GreaterThan(0));
            Assert.That(ahead.Losses, Is.EqualTo(plain.Losses), $"seed {seed}");
            Assert.That(ahead.Weights.AsSpan().SequenceEqual(plain.Weights), Is.True, $"seed {seed}");
            Assert.That(ahead.Tokens, Is.EqualTo(plain.Tokens));
        }
    }

    [Test]
    public void Ahead_OneSampleToAStep_IsNever()
    {
        using TrainingRun run = Create(accumulation: 1);
        run.StartAhead();
        run.Cursor.AdvanceForward(run.Cursor.Sample.Ids.Length);

        Assert.That(run.Cursor.Phase, Is.EqualTo(TrainingPhase.Backward));
        Assert.That(run.Cursor.Ahead, Is.Null, "the next sample sees other weights");
    }

    [Test]
    public void StopAhead_GivesItsRoomBack()
    {
        using TrainingRun run = Create(accumulation: 3);
        long alone = _backend.AllocatedBytes;
        MemoryTable table = run.Memory();
        run.StartAhead();
        Assert.That(_backend.AllocatedBytes, Is.GreaterThan(alone));
        Assert.That(run.Memory().Bytes - table.Bytes, Is.EqualTo(_backend.AllocatedBytes - alone), "the table tells it");
        Assert.That(run.StopAhead(), Is.Zero);
        Assert.That(_backend.AllocatedBytes, Is.EqualTo(alone));
    }

    private sealed record Outcome(byte[] Weights, double[] Losses, long Tokens, int WindowsAhead);

    private Outcome Train(int accumulation, ulong? seed)
    {
        using TrainingRun run = Create(accumulation);
        using var forward = new ForwardPass(_model, RowsMax, sampledMax: 1);
        using var backward = new BackwardPass(_model, RowsMax);
        var batch = new TokenBatch(RowsMax);
        var random = new SeededRandom(seed ?? 0);
        var losses = new List<double>();
        int windowsAhead = 0;
        while (run.Cursor.Phase != TrainingPhase.Done)
        {
            TrainingCursor cursor = run.Cursor;
            if (cursor.Phase == TrainingPhase.Forward)
            {
                Window(cursor.Sample.Ids.Length - cursor.PositionsDone);
                continue;
            }

            // Now and then the room is taken away, and what was done in it is lost.
            if (seed is not null && !run.RunsAhead && random.Next(4) == 0)
            {
                run.StartAhead();
            }
            else if (seed is not null && random.Next(40) == 0)
            {
                run.StopAhead();
            }

            if (run.RunsAhead && cursor.Ahead is TrainingSample ahead && cursor.AheadDone < ahead.Ids.Length && random.Next(2) == 0)
            {
                Window(ahead.Ids.Length - cursor.AheadDone);
                windowsAhead++;
                continue;
            }

            if (run.RunBackward(backward, seed is null ? cursor.RowsLeft : 1 + random.Next(cursor.RowsLeft)))
            {
                run.Step();
                losses.Add(run.LastLoss);
            }
        }

        byte[] weights = [.. run.Adapter.Tensors().SelectMany(t =>
        {
            float[] values = new float[t.Tensor.Spec.Count];
            _backend.Download(t.Tensor.Values, values);
            return MemoryMarshal.AsBytes<float>(values).ToArray();
        })];
        return new Outcome(weights, [.. losses], run.TokensDone, windowsAhead);

        void Window(int left)
        {
            int tokens = seed is null ? left : 1 + random.Next(left);
            batch.Clear();
            run.AddForwardWindow(batch, tokens);
            forward.Run(batch);
            run.CompleteForward(tokens);
        }
    }

    private TrainingRun Create(int accumulation)
    {
        TrainingSample[] samples = [.. Lengths.Select((length, i) => TrainingSample.FromTokens(
            TinyModel.Ids(length, (ulong)i + 1), [.. Enumerable.Repeat(true, length)]))];
        var method = new LoraConfig { Rank = 4, Alpha = 8, TargetModules = ["q_proj", "v_proj", "down_proj"] };
        return new TrainingRun(_model, PeftAdapter.CreateRandom(_backend, _model.Config, method, 1), new TrainingPlan
        {
            Samples = samples,
            Epochs = 2,
            GradientAccumulation = accumulation,
            ShuffleSeed = 3,
            Optimizer = new AdamWOptions { LearningRate = 1e-2f },
        });
    }
}
