using System.Collections.Immutable;
using FlexLLM.Primitives;
using FlexLLM.Scheduling;

namespace FlexLLM.Engine;

/// <summary>One tenant's account.</summary>
internal sealed class Tenant(string name, double weight)
{
    public string Name { get; } = name;

    public double Weight { get; } = weight;

    /// <summary>Prompt tokens and twice the generated ones, per weight.</summary>
    public double Served { get; set; }

    public TimeSpan LastAdmission { get; set; }

    /// <summary>Its place in the snapshot.</summary>
    public int Slot { get; set; } = -1;

    /// <summary>Requests in the engine.</summary>
    public int Active { get; set; }

    /// <summary>Of them, those that wait for a place.</summary>
    public int Waiting { get; set; }
}

/// <summary>
/// Virtual token counters (Sheng et al., OSDI'24): who got how much. A tenant whose first request comes to wait is lifted to the least
/// counter of those that wait, so that nobody saves service up. Of tenants without requests only so many are remembered; the one that
/// had least, and so loses least by it, is forgotten first.
/// </summary>
internal sealed class TenantTable(IReadOnlyDictionary<string, double> weights, int idleMax = 1024)
{
    private const double PromptWeight = 1.0;
    private const double GeneratedWeight = 2.0;

    private readonly Dictionary<string, double> _weights = new(weights, StringComparer.Ordinal);
    private readonly Dictionary<string, Tenant> _tenants = new(StringComparer.Ordinal);
    private readonly List<Tenant> _active = [];
    private double _floor; // The counter of the last that stopped waiting.

    /// <summary>Tenants remembered.</summary>
    public int Count => _tenants.Count;

    /// <summary>A request came; null names the anonymous tenant.</summary>
    public Tenant Enter(string? name)
    {
        name ??= string.Empty;
        if (!_tenants.TryGetValue(name, out Tenant? tenant))
        {
            tenant = new Tenant(name, _weights.GetValueOrDefault(name, 1.0));
            _tenants.Add(name, tenant);
        }

        if (tenant.Active++ == 0)
        {
            tenant.Slot = _active.Count;
            _active.Add(tenant);
        }

        Wait(tenant);
        return tenant;
    }

    /// <summary>A request of it came, or lost its place.</summary>
    public void Wait(Tenant tenant)
    {
        if (tenant.Waiting++ > 0)
        {
            return;
        }

        double least = double.PositiveInfinity;
        foreach (Tenant other in _active)
        {
            least = other.Waiting > 0 && other != tenant ? Math.Min(least, other.Served) : least;
        }

        tenant.Served = Math.Max(tenant.Served, double.IsPositiveInfinity(least) ? _floor : least);
    }

    /// <summary>A waiting request got a place.</summary>
    /// <param name="tenant">Whose.</param>
    /// <param name="promptTokens">Its prompt; 0 when it is not its first place.</param>
    /// <param name="now">Time since the engine's start.</param>
    public void Admit(Tenant tenant, int promptTokens, TimeSpan now)
    {
        StopWaiting(tenant);
        tenant.Served += PromptWeight * promptTokens / tenant.Weight;
        tenant.LastAdmission = now;
    }

    /// <summary>A token was generated for it.</summary>
    public static void Generated(Tenant tenant) => tenant.Served += GeneratedWeight / tenant.Weight;

    /// <summary>A request of it ended.</summary>
    public void Leave(Tenant tenant, bool waiting)
    {
        if (waiting)
        {
            StopWaiting(tenant);
        }

        Check.That(tenant.Active > 0);
        if (--tenant.Active > 0)
        {
            return;
        }

        Tenant last = _active[^1];
        _active[tenant.Slot] = last;
        last.Slot = tenant.Slot;
        _active.RemoveAt(_active.Count - 1);
        tenant.Slot = -1;
        if (_tenants.Count - _active.Count > idleMax)
        {
            _tenants.Remove(_tenants.Values.Where(t => t.Active == 0).MinBy(t => t.Served)!.Name);
        }
    }

    /// <summary>What the planner sees, by slot; empty where there is nobody to be fair to.</summary>
    public ImmutableArray<TenantSnapshot> Snapshot()
    {
        if (_active.Count < 2)
        {
            return [];
        }

        var tenants = ImmutableArray.CreateBuilder<TenantSnapshot>(_active.Count);
        foreach (Tenant t in _active)
        {
            tenants.Add(new TenantSnapshot { Served = t.Served, Weight = t.Weight, LastAdmission = t.LastAdmission });
        }

        return tenants.MoveToImmutable();
    }

    private void StopWaiting(Tenant tenant)
    {
        Check.That(tenant.Waiting > 0);
        tenant.Waiting--;
        _floor = tenant.Waiting == 0 ? Math.Max(_floor, tenant.Served) : _floor;
    }
}
