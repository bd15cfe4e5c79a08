"""The performance section of README, with one figure and one table, from the committed JSON in bench/results.

    python -m bench.report                          # writes the section and docs/performance.svg
    python -m bench.report --check                  # exit code 1 if the section or the figure does not match the JSON

The section stands between two markers. If there is a bench/results/gpu_*.json, the section shows the latest one by date.
Otherwise it shows the results without a GPU, host.json and cpu_step.json, and says so. The figure contains a digest of its
numbers. --check compares this digest, so it does not need matplotlib.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import harness, host, peers
from bench.goals import CLIPPED, OURS, USUAL

BEGIN, END = "<!-- performance:begin -->", "<!-- performance:end -->"
FIGURE = Path("docs/performance.svg")
HOST_ROWS = {
    host.FUSED: "torch fused, its operator stubbed",
    f"{host.FUSED}, steps too": "torch fused, the operator for step counters stubbed too",
    OURS: "**lwadamw**",
    "lwadamw, clipping": "with clipping",
    "lwadamw, lr scheduled": "every learning rate assigned before every step",
    "lwadamw, state shared": "after `optimizer.state` was read: every moment is verified",
}
STEP_ROWS = {peers.FUSED: "torch fused", OURS: "**lwadamw**", "lwadamw, clipping": "with clipping"}
COLOURS = {OURS: "#c8553d", host.FUSED: "#4d6a8a", "torch foreach": "#9aa5b1", f"{host.FUSED}, steps too": "#9db4cc"}
OTHER_COLOURS = ("#7a9e7e", "#b8a15a", "#8d6a9f", "#5b5b5b")


@dataclass
class Panel:
    """A chart with grouped bars.

    Attributes:
        title: title of the chart.
        unit: label of the vertical axis.
        positions: labels on the horizontal axis.
        series: by name, one value per position; None: no bar.
        log: whether the vertical axis is logarithmic.
        level: value of a horizontal line to compare the bars with; None: no line.
    """

    title: str
    unit: str
    positions: list[str]
    series: dict[str, list[float | None]]
    log: bool = False
    level: float | None = None


@dataclass
class Report:
    """The content of the section.

    Attributes:
        lead: the text above the figure.
        header: titles of the columns.
        rows: cells of the table.
        conditions: paragraphs below the table: command, machine and link to the results.
        panels: charts of the figure.
    """

    lead: str
    header: list[str]
    rows: list[list[str]]
    conditions: list[str]
    panels: list[Panel]

    def digest(self) -> str:
        """A hash of everything that the figure shows."""
        numbers = json.dumps([vars(panel) for panel in self.panels], sort_keys=True)
        return hashlib.sha256(numbers.encode()).hexdigest()[:16]

    def section(self) -> str:
        """The section as Markdown, with its markers."""
        table = harness.table(self.header, self.rows)
        picture = f"![{'; '.join(panel.title for panel in self.panels)}]({FIGURE.as_posix()})"
        conditions = "\n\n".join(self.conditions)
        return f"{BEGIN}\n{self.lead}\n\n{picture}\n\n{table}\n\n{conditions}\n{END}"


def conditions(record: dict[str, Any], what: str, path: Path) -> str:
    """The paragraph with the command, the machine and the link to a result file."""
    command = record["command"]
    return f"{what}: `{command}`, {harness.one_line(record['machine'])}, [results](bench/results/{path.name})."


def read(path: Path) -> dict[str, Any]:
    """Read a result file."""
    return json.loads(path.read_text())


def from_gpu(path: Path) -> Report:
    """The report of a run of bench.gpu."""
    record = read(path)
    rows, positions = [], []
    results = record["step"]
    for compiled in record.get("compile", ()):  # measured apart from the other peers
        same = [r for r in results if (r["workload"], r["groups"]) == (compiled["workload"], compiled["groups"])]
        for result in same:
            result["rows"] = {**compiled["rows"], **result["rows"]}
    for result in results:
        ours, fused = result["rows"][OURS], result["rows"][peers.FUSED]
        usual, clipped = result["rows"].get(USUAL), result["rows"][CLIPPED]
        size = f"{result['elements'] / 1e6:,.1f}M in {result['tensors']:,}"
        figures = [f"{ours['ms']['p50']:.3f}", f"{ours['of_copy']:.0%}", f"{fused['ms']['p50']:.3f}"]
        figures += [f"{ours['vs_fused']:.2f}x", f"{usual['ms']['p50'] / clipped['ms']['p50']:.2f}x" if usual else "-"]
        rows.append([result["workload"], size, f"{result['groups']:,}", *figures])
        positions.append(f"{result['workload']}\n{result['groups']} gr.")
    names = dict.fromkeys(name for r in results for name in r["rows"] if "norms" not in name and "clip" not in name)
    shares = {name: [r["rows"][name]["of_copy"] if name in r["rows"] else None for r in results] for name in names}
    panel = Panel("Bytes per second of a step, over a measured copy's", "share of copy", positions, shares, level=1.0)
    lead = (
        "Time of a float32 step on a GPU. It is compared with a copy of as many bytes on the same GPU, and with torch\n"
        "fused in the same run."
    )
    header = ["workload", "parameters in tensors", "groups", "lwadamw, ms", "of copy", "torch fused, ms", "faster"]
    header.append("clipped, norms read: over the usual way")
    return Report(lead, header, rows, [conditions(record, "Step", path)], [panel])


def group_label(groups: int, tensors: int) -> str:
    """The label of a number of groups; the same for all workloads with one group per tensor."""
    return "a group per tensor" if groups == tensors else f"{groups} group{'s' * (groups != 1)}"


def from_cpu(results: Path) -> Report:
    """The report of the results without a GPU, host.json and cpu_step.json in a folder."""
    host_path, step_path = results / "host.json", results / "cpu_step.json"
    on_host, step = read(host_path), read(step_path)
    by_label = {group_label(c["groups"], on_host["tensors"]): c["us"] for c in on_host["columns"]}
    by_workload: dict[str, dict[str, Any]] = {}
    for result in step["results"]:
        of_workload = by_workload.setdefault(f"{result['workload']}, {result['tensors']} tensors", {})
        of_workload[group_label(result["groups"], result["tensors"])] = result["rows"]
    labels = list(dict.fromkeys([*by_label, *(label for steps in by_workload.values() for label in steps)]))
    rows = []
    for name, title in HOST_ROWS.items():
        cells = []
        for us in (by_label.get(label) for label in labels):
            faster = f" ({us[host.FUSED]['p50'] / us[name]['p50']:.1f}x)" if us and name != host.FUSED else ""
            cells.append(f"{us[name]['p50']:.0f}{faster}" if us else "-")
        rows.append([f"host, us: {title}", *cells])
    for workload, steps in by_workload.items():
        for name, title in STEP_ROWS.items():
            cells = []
            for row in (steps.get(label, {}).get(name) for label in labels):
                faster = f" ({row['vs_fused']:.2f}x)" if row and name != peers.FUSED else ""
                cells.append(f"{row['ms']['p50']:.1f}{faster}" if row else "-")
            rows.append([f"CPU step, ms, {workload}: {title}", *cells])
    elements = step["results"][0]["elements"]
    first, steps = next(iter(by_workload.items()))
    host_title = f"Host time of step(), {on_host['tensors']} tensors, launches stubbed"
    step_title = f"Step on the CPU, {elements / 1e6:.0f}M parameters in {first.partition(', ')[2]}"
    panels = [
        Panel(
            host_title, "microseconds", list(by_label),
            {n: [us[n]["p50"] for us in by_label.values()] for n in (host.FUSED, f"{host.FUSED}, steps too", OURS)}, log=True,
        ),
        Panel(
            step_title, "milliseconds", list(steps),
            {n: [rows_[n]["ms"]["p50"] for rows_ in steps.values()] for n in (peers.FUSED, OURS)},
        ),
    ]  # fmt: skip
    lead = (
        "**The speed of these kernels on a GPU has not been measured yet.** `make gpu-bench` measures it. The table shows\n"
        "what was measured without a GPU: the host time of step() with stubbed launches, and the time of a step on the CPU.\n"
        "The values are medians. The number in brackets says how many times faster than torch fused the row is."
    )
    under = [conditions(on_host, host_title, host_path), conditions(step, "Step on the CPU", step_path)]
    return Report(lead, ["", *labels], rows, under, panels)


def build(results: Path) -> Report:
    """The report of the results in a folder: of the latest GPU run if there is one, else of the CPU."""
    on_gpu = sorted(results.glob("gpu_*.json"), key=lambda path: (read(path)["machine"]["date"], path.name))
    return from_gpu(on_gpu[-1]) if on_gpu else from_cpu(results)


def draw(report: Report, path: Path) -> None:
    """Draw the figure of a report as SVG."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    style = {"svg.hashsalt": "lwadamw", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        wide = sum(max(4, len(panel.positions)) for panel in report.panels)
        figure, axes = pyplot.subplots(
            1, len(report.panels), figsize=(min(12.0, 1.1 * wide + 1), 3.4), squeeze=False, layout="constrained"
        )
        for panel, ax in zip(report.panels, axes[0], strict=True):
            _bars(ax, panel)
        figure.savefig(path, facecolor="white", metadata={"Date": None, "Description": f"numbers {report.digest()}"})
        pyplot.close(figure)


def _bars(ax: Any, panel: Panel) -> None:
    width = 0.8 / len(panel.series)
    spare = iter(OTHER_COLOURS * 3)
    for i, (name, values) in enumerate(panel.series.items()):
        places = [p + (i - (len(panel.series) - 1) / 2) * width for p in range(len(values))]
        known = [(x, y) for x, y in zip(places, values, strict=True) if y is not None]
        bars = ax.bar(*zip(*known, strict=True), width, label=name, color=COLOURS.get(name) or next(spare))
        if len(panel.positions) <= 4:
            ax.bar_label(bars, [f"{y:,.0f}" if y >= 100 else f"{y:.3g}" for _, y in known], fontsize=7, padding=1)
    if panel.level is not None:
        ax.axhline(panel.level, color="#333333", linewidth=0.8, linestyle="--")
    if panel.log:
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:,.0f}")
    else:
        ax.margins(y=0.15)
    ax.set_xticks(range(len(panel.positions)), panel.positions, fontsize=7 if len(panel.positions) > 4 else 9)
    ax.set_title(panel.title, fontsize=9)
    ax.set_ylabel(panel.unit)
    # Below the axes, because inside them it would cover bars.
    columns = len(panel.series) if len(panel.positions) > 4 else 2
    ax.legend(frameon=False, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=columns)


def replaced(text: str, section: str) -> str:
    """Replace the section in the text of README.

    Args:
        text: the text of README.
        section: the new section with its markers.

    Raises:
        ValueError: a marker does not occur exactly once.
    """
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(
            f"README must contain {BEGIN} once and {END} once. Add the missing marker, or remove the extra one."
        )
    before, _, rest = text.partition(BEGIN)
    return before + section + rest.partition(END)[2]


def out_of_date(report: Report, root: Path) -> list[str]:
    """The files, README or the figure, that do not match a report."""
    text = (root / "README.md").read_text()
    figure = root / FIGURE
    stale = [] if replaced(text, report.section()) == text else ["README.md"]
    drawn = figure.is_file() and f"numbers {report.digest()}" in figure.read_text()
    return stale if drawn else [*stale, FIGURE.as_posix()]


def main(argv: Sequence[str] | None = None) -> None:
    """Write the section and the figure, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit code 1 if a file is out of date")
    parser.add_argument("--root", type=Path, default=harness.ROOT, help="folder of the repository")
    arguments = parser.parse_args(argv)
    report = build(arguments.root / "bench/results")
    if arguments.check:
        stale = out_of_date(report, arguments.root)
        sys.exit(f"out of date: {', '.join(stale)}. Run python -m bench.report." if stale else 0)
    readme = arguments.root / "README.md"
    readme.write_text(replaced(readme.read_text(), report.section()))
    draw(report, arguments.root / FIGURE)
    print(report.section())


if __name__ == "__main__":
    main()
