using System.Globalization;
using System.Xml.Linq;

namespace FlexLLM.Benchmarks.Serving;

/// <summary>One line of a chart.</summary>
/// <param name="Name">Shown where the reader points at it.</param>
/// <param name="Style">CSS class that gives the colour, such as "c0".</param>
/// <param name="Points">Ascending in X.</param>
internal sealed record SvgLine(string Name, string Style, IReadOnlyList<(double X, double Y)> Points)
{
    /// <summary>Drawn broken, as somebody else's figures are.</summary>
    public bool IsDashed { get; init; }

    /// <summary>Marks every point; for lines of few points.</summary>
    public bool HasMarkers { get; init; }

    /// <summary>Goes level from each point to the next and then up or down to it, as shares and rates of intervals do.</summary>
    public bool IsStepped { get; init; }
}

/// <summary>
/// A line chart as an SVG element: title, axes with units, grid, lines, and at most one upright mark. Colours come from the style
/// sheet of the page, so that one drawing serves light and dark.
/// </summary>
internal sealed record SvgChart(string Title, string XLabel, string YLabel)
{
    /// <summary>Namespace of the elements.</summary>
    public static readonly XNamespace Svg = "http://www.w3.org/2000/svg";

    private const double Left = 66;
    private const double Right = 14;
    private const double Top = 30;
    private const double Bottom = 44;

    public required IReadOnlyList<SvgLine> Lines { get; init; }

    public double Width { get; init; } = 520;

    public double Height { get; init; } = 300;

    /// <summary>Least value of the upright axis, or null to fit.</summary>
    public double? YMin { get; init; } = 0;

    /// <summary>Greatest value of the upright axis, or null to fit; charts of one row share it.</summary>
    public double? YMax { get; init; }

    /// <summary>Greatest value of the level axis, or null to fit.</summary>
    public double? XMax { get; init; }

    /// <summary>Powers of ten at equal distances on the level axis; values at or below zero are left out.</summary>
    public bool IsXLogarithmic { get; init; }

    /// <summary>Where to draw an upright mark, such as a target, with its name.</summary>
    public (double X, string Name)? Mark { get; init; }

    /// <summary>The drawing.</summary>
    public XElement Draw()
    {
        double[] xs = [.. Lines.SelectMany(l => l.Points).Select(p => p.X).Append(Mark?.X ?? double.NaN).Where(IsShown)];
        double[] ys = [.. Lines.SelectMany(l => l.Points).Where(p => IsShown(p.X)).Select(p => p.Y).Where(double.IsFinite)];
        Axis x = IsXLogarithmic
            ? Axis.Powers(xs, Left, Width - Right)
            : Axis.Linear(0, XMax ?? xs.DefaultIfEmpty(1).Max(), Left, Width - Right, exactEnd: true);
        Axis y = Axis.Linear(
            YMin ?? ys.DefaultIfEmpty(0).Min(), YMax ?? ys.DefaultIfEmpty(1).Max(), Height - Bottom, Top, exactEnd: YMax is not null);
        var svg = new XElement(
            Svg + "svg", new XAttribute("viewBox", $"0 0 {N(Width)} {N(Height)}"), new XAttribute("width", N(Width)),
            new XAttribute("height", N(Height)), new XAttribute("role", "img"), new XAttribute("aria-label", Title),
            Text(Left, 18, "title", "start", Title));
        foreach ((double value, string label) in x.Ticks)
        {
            svg.Add(Segment("grid", x.At(value), Top, x.At(value), Height - Bottom));
            svg.Add(Text(x.At(value), Height - Bottom + 15, "tick", "middle", label));
        }

        foreach ((double value, string label) in y.Ticks)
        {
            svg.Add(Segment("grid", Left, y.At(value), Width - Right, y.At(value)));
            svg.Add(Text(Left - 6, y.At(value) + 4, "tick", "end", label));
        }

        svg.Add(Segment("axis", Left, Height - Bottom, Width - Right, Height - Bottom));
        svg.Add(Text((Left + Width - Right) / 2, Height - 10, "label", "middle", XLabel));
        XElement upright = Text(0, 0, "label", "middle", YLabel);
        upright.SetAttributeValue("transform", $"translate(13 {N((Top + Height - Bottom) / 2)}) rotate(-90)");
        svg.Add(upright);
        if (Mark is (double place, string name) && IsShown(place))
        {
            svg.Add(Segment("mark", x.At(place), Top, x.At(place), Height - Bottom));
            bool isRight = x.At(place) > Width / 2;
            svg.Add(Text(x.At(place) + (isRight ? -4 : 4), Height - Bottom - 6, "tick", isRight ? "end" : "start", name));
        }

        foreach (SvgLine line in Lines)
        {
            svg.Add(DrawLine(line, x, y));
        }

        return svg;
    }

    private XElement DrawLine(SvgLine line, Axis x, Axis y)
    {
        (double X, double Y)[] points =
        [
            .. line.Points.Where(p => IsShown(p.X) && double.IsFinite(p.Y)).Select(p => (X: x.At(p.X), Y: y.At(p.Y))),
        ];
        var path = new System.Text.StringBuilder();
        for (int i = 0; i < points.Length; i++)
        {
            path.Append(i == 0 ? 'M' : 'L');
            if (line.IsStepped && i > 0)
            {
                path.Append(CultureInfo.InvariantCulture, $"{N(points[i].X)} {N(points[i - 1].Y)}L");
            }

            path.Append(CultureInfo.InvariantCulture, $"{N(points[i].X)} {N(points[i].Y)}");
        }

        var group = new XElement(
            Svg + "g", new XAttribute("class", $"line {line.Style}{(line.IsDashed ? " dashed" : "")}"),
            new XElement(Svg + "title", line.Name), new XElement(Svg + "path", new XAttribute("d", path.ToString())));
        if (line.HasMarkers)
        {
            foreach ((double px, double py) in points)
            {
                group.Add(new XElement(
                    Svg + "circle", new XAttribute("cx", N(px)), new XAttribute("cy", N(py)), new XAttribute("r", "3.5")));
            }
        }

        return group;
    }

    private bool IsShown(double x) => double.IsFinite(x) && (!IsXLogarithmic || x > 0);

    private static XElement Segment(string style, double x1, double y1, double x2, double y2) => new(
        Svg + "line", new XAttribute("class", style), new XAttribute("x1", N(x1)), new XAttribute("y1", N(y1)),
        new XAttribute("x2", N(x2)), new XAttribute("y2", N(y2)));

    private static XElement Text(double x, double y, string style, string anchor, string text) => new(
        Svg + "text", new XAttribute("class", style), new XAttribute("x", N(x)), new XAttribute("y", N(y)),
        new XAttribute("text-anchor", anchor), text);

    private static string N(double value) => Math.Round(value, 2).ToString("0.##", CultureInfo.InvariantCulture);

    /// <summary>Values to places on the drawing, with round values to label.</summary>
    private sealed record Axis(double Min, double Max, double From, double To, bool IsLogarithmic)
    {
        public IReadOnlyList<(double Value, string Label)> Ticks { get; private init; } = [];

        /// <summary>Equal distances for equal differences; ends at a round value, or where the data end.</summary>
        public static Axis Linear(double min, double max, double from, double to, bool exactEnd)
        {
            max = max > min ? max : min + 1;
            double step = RoundStep((max - min) / 5);
            double end = exactEnd ? max : Math.Ceiling((max / step) - 1e-9) * step;
            var ticks = new List<(double, string)>();
            for (double i = Math.Ceiling((min / step) - 1e-9); i * step <= end + (1e-9 * step); i++)
            {
                ticks.Add((i * step, Label(i * step)));
            }

            return new Axis(min, end, from, to, IsLogarithmic: false) { Ticks = ticks };
        }

        /// <summary>Equal distances for equal ratios.</summary>
        public static Axis Powers(double[] values, double from, double to)
        {
            double min = Math.Log10(Round(values.DefaultIfEmpty(1).Min(), -1));
            double max = Math.Log10(Round(values.DefaultIfEmpty(10).Max(), 1));
            max = max > min ? max : min + 1;
            double[] digits = max - min > 2.5 ? [1] : max - min > 1 ? [1, 2, 5] : [1, 1.5, 2, 3, 5, 7];
            var ticks = new List<(double, string)>();
            for (double power = Math.Floor(min); power <= max; power++)
            {
                ticks.AddRange(digits
                    .Select(d => d * Math.Pow(10, power))
                    .Where(v => Math.Log10(v) >= min - 1e-9 && Math.Log10(v) <= max + 1e-9)
                    .Select(v => (v, Label(v))));
            }

            return new Axis(min, max, from, to, IsLogarithmic: true) { Ticks = ticks };
        }

        public double At(double value)
        {
            double place = ((IsLogarithmic ? Math.Log10(value) : value) - Min) / (Max - Min);
            return From + (Math.Clamp(place, 0, 1) * (To - From));
        }

        // The nearest round value that is not above (-1) or not below (1): narrow ranges have a labelled value at each end too.
        private static double Round(double value, int direction)
        {
            double power = Math.Pow(10, Math.Floor(Math.Log10(value)));
            double[] round = [.. new[] { 1, 1.5, 2, 3, 5, 7, 10 }.Select(d => d * power)];
            return direction < 0
                ? round.Where(v => v <= value * (1 + 1e-9)).DefaultIfEmpty(power).Max()
                : round.Where(v => v >= value * (1 - 1e-9)).DefaultIfEmpty(10 * power).Min();
        }

        // 1, 2 or 5 times a power of ten, at least as large as asked for.
        private static double RoundStep(double least)
        {
            double power = Math.Pow(10, Math.Floor(Math.Log10(least)));
            double ratio = least / power;
            return power * (ratio <= 1 ? 1 : ratio <= 2 ? 2 : ratio <= 5 ? 5 : 10);
        }

        // Adding zero makes nothing of the sign that a zero may have.
        private static string Label(double value) => (value + 0.0).ToString(
            Math.Abs(value) >= 1000 ? "#,0" : "0.####", CultureInfo.InvariantCulture);
    }
}
