namespace FlexLLM.Benchmarks.Serving;

/// <summary>Style sheet of the report's page. Has no "greater than" sign: the page is XML, and HTML does not unescape styles.</summary>
internal static class ServingStyle
{
    public const string Sheet = """

        :root { color-scheme: light dark; --back: #fff; --ink: #1c2024; --faint: #60646c; --rule: #e2e4e8;
          --k0: #0b62d6; --k1: #6b7280; --k2: #2f9e44; --k3: #e8590c; --k4: #c2255c; --k5: #7048e8; --k6: #0c8599;
          --k7: #a97400; --k8: #862e9c; --k9: #8d5a3b; --k10: #5c940d; --k11: #1c2024; }
        @media (prefers-color-scheme: dark) { :root { --back: #14171a; --ink: #e8eaed; --faint: #a0a6ae; --rule: #2d3238;
          --k0: #5ea8ff; --k1: #a0a6ae; --k2: #69db7c; --k3: #ff9a5c; --k4: #ff7eb0; --k5: #b197fc; --k6: #5fd3e4;
          --k7: #f2c14e; --k8: #e08bf2; --k9: #d6a584; --k10: #b5de5a; --k11: #e8eaed; } }
        body { background: var(--back); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; max-width: 1120px;
          margin: 2rem auto; padding: 0 1rem; }
        h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.25rem; margin-top: 2.5rem; }
        h3 { font-size: 1.05rem; margin: 2rem 0 .25rem; }
        .wide { overflow-x: auto; }
        table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
        th, td { padding: .25rem .5rem; text-align: right; border-bottom: 1px solid var(--rule); white-space: nowrap; }
        th { color: var(--faint); font-weight: 600; vertical-align: bottom; white-space: normal; min-width: 3.2em; }
        th:first-child, td:first-child, th:nth-child(2), td:nth-child(2) { text-align: left; }
        .charts { display: flex; flex-wrap: wrap; gap: .5rem 1rem; }
        svg { max-width: 100%; height: auto; font: 11px system-ui, sans-serif; }
        svg text { fill: var(--faint); } svg .title { fill: var(--ink); font-size: 13px; font-weight: 600; }
        .grid { stroke: var(--rule); } .axis { stroke: var(--faint); } .mark { stroke: var(--ink); stroke-dasharray: 4 3; }
        .line path { fill: none; stroke: var(--k); stroke-width: 1.8; stroke-linejoin: round; }
        .line circle { fill: var(--k); stroke: var(--back); } .dashed path { stroke-dasharray: 5 4; }
        .dashed circle { fill: var(--back); stroke: var(--k); stroke-width: 1.5; }
        .line:hover path { stroke-width: 4; } .c0 path { stroke-width: 3; }
        .legend span { margin-right: 1.1em; white-space: nowrap; }
        .legend i { display: inline-block; width: 1.2em; height: .35em; border-radius: .2em; background: var(--k);
          margin: 0 .4em .15em 0; }
        .c0 { --k: var(--k0); } .c1 { --k: var(--k1); } .c2 { --k: var(--k2); } .c3 { --k: var(--k3); } .c4 { --k: var(--k4); }
        .c5 { --k: var(--k5); } .c6 { --k: var(--k6); } .c7 { --k: var(--k7); } .c8 { --k: var(--k8); } .c9 { --k: var(--k9); }
        .c10 { --k: var(--k10); } .c11 { --k: var(--k11); } .served { --k: var(--k0); } .trained { --k: var(--k3); }
        dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: 13px; }
        dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; } summary { font-weight: 600; margin-top: 1rem; }

        """;
}
