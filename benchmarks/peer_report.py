"""The table and the picture of ``benchmarks/against_peers.py``."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PACKAGES = ("jax", "flax", "qwix", "torch", "transformers", "peft")
COLUMNS = (
    "case",
    "side",
    "trained tokens/s",
    "adaptax's best is",
    "peak memory",
    "to the first step",
    "compilation",
    "last loss",
)


@dataclasses.dataclass(frozen=True)
class Summary:
    """One side in one case: medians over the rounds."""

    case: str
    side: str
    rank: int
    rate: float  # trained tokens per second behind the first step
    peak_gib: float
    first_seconds: float
    compile_seconds: float | None
    loss: float
    failure: str | None

    @classmethod
    def of(cls, runs: Sequence[Any]) -> Summary:
        """Of the runs of one side; where one failed, that is what is told."""
        failed = next((run for run in runs if run.failure), None)
        first = runs[0]
        if failed:
            return cls(first.case, first.side, first.rank, 0.0, failed.peak_gib, 0.0, None, 0.0, failed.failure)
        rates = [sum(run.trained[1:]) / sum(run.seconds[1:]) for run in runs]
        compiled = [run.compile_seconds for run in runs if run.compile_seconds is not None]
        return cls(
            first.case,
            first.side,
            first.rank,
            statistics.median(rates),
            max(run.peak_gib for run in runs),
            statistics.median(run.first_seconds for run in runs),
            statistics.median(compiled) if compiled else None,
            first.losses[-1],
            None,
        )


def summarize(measured: Sequence[Any]) -> list[Summary]:
    """One summary for each case, rank and side, in the order they came."""
    groups: dict[tuple[str, int, str], list[Any]] = {}
    for run in measured:
        groups.setdefault((run.case, run.rank, run.side), []).append(run)
    return [Summary.of(runs) for runs in groups.values()]


def show_table(summaries: Sequence[Summary]) -> list[str]:
    """Lines of a ``list-table``."""
    lines = [".. list-table::", "   :header-rows: 1", ""]
    rows = [COLUMNS]
    for summary in summaries:
        place = summary.case, summary.rank
        ours = [s.rate for s in summaries if (s.case, s.rank) == place and s.side.startswith("adaptax")]
        case = f"{summary.case}, rank {summary.rank}"
        if summary.failure:
            rows.append((case, summary.side, summary.failure, "", f"{summary.peak_gib:.2f} GiB", "", "", ""))
            continue
        is_ours = summary.side.startswith("adaptax")
        ratio = f"{max(ours) / summary.rate:.2f} x" if not is_ours and max(ours, default=0.0) else ""
        compiled = "" if summary.compile_seconds is None else f"{max(summary.compile_seconds, 0):.1f} s"
        rest = f"{summary.peak_gib:.2f} GiB", f"{summary.first_seconds:.1f} s", compiled, f"{summary.loss:.4f}"
        rows.append((case, summary.side, f"{summary.rate:.1f}", ratio, *rest))
    for row in rows:
        lines += [f"   {'* -' if k == 0 else '  -'} {text}".rstrip() for k, text in enumerate(row)]
    return lines


def describe_machine() -> str:
    """Processor, memory and versions."""
    names: list[str] = []
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.exists():
        names = [
            line.split(":")[1].strip() for line in cpu_info.read_text().splitlines() if line.startswith("model name")
        ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    processor = names[0] if names else platform.machine()
    return f"{os.cpu_count()} cores ({processor}), {memory:.0f} GiB; Python {platform.python_version()}, {versions}"


def draw(path: Path, summaries: Sequence[Summary]) -> None:
    """Trained tokens per second and peak memory of each side, case by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = list(dict.fromkeys((s.case, s.rank) for s in summaries))
    sides = list(dict.fromkeys(s.side for s in summaries))
    colors = {side: f"C{k}" for k, side in enumerate(sides)}
    width = 2.2 + 2.1 * len(cases)
    columns = min(len(sides), int(width // 1.8))
    legend = 0.25 * -(-len(sides) // columns) + 0.1  # inches
    figure, axes = pyplot.subplots(2, len(cases), figsize=(width, 5.0 + legend), squeeze=False)
    for column, (case, rank) in enumerate(cases):
        shown = [s for s in summaries if (s.case, s.rank) == (case, rank)]
        for row, values in enumerate(([s.rate for s in shown], [s.peak_gib for s in shown])):
            axis = axes[row][column]
            bars = axis.bar(range(len(shown)), values, color=[colors[s.side] for s in shown])
            texts = ["" if s.failure and row == 0 else f"{v:.3g}" for s, v in zip(shown, values, strict=True)]
            axis.bar_label(bars, texts, fontsize=7)
            axis.set_xticks([])
            axis.spines[["top", "right"]].set_visible(False)
            axis.margins(y=0.15)
        axes[0][column].set_title(f"{case}\nrank {rank}", fontsize=9)
    axes[0][0].set_ylabel("trained tokens/s")
    axes[1][0].set_ylabel("peak memory, GiB")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[side]) for side in sides]
    figure.legend(handles, sides, loc="lower center", ncols=columns, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, legend / (5.0 + legend), 1, 1))
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def write_report(path: Path, size: str, measured: Sequence[Any], command: str) -> None:
    """``path`` with .rst, .json and .png: the table with its command, what was measured, the picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    summaries = summarize(measured)
    rounds = max(sum((r.case, r.rank, r.side) == (s.case, s.rank, s.side) for r in measured) for s in summaries)
    lines = [".. code-block:: bash", "", f"   {command}", "", f"Gemma 3 {size} on {describe_machine()}.", ""]
    lines += [f"{'Median of ' + str(rounds) + ' rounds' if rounds > 1 else 'One round'}.", ""]
    lines += show_table(summaries)
    path.with_suffix(".rst").write_text("\n".join(lines) + "\n")
    machine = {"size": size, "command": command, "machine": describe_machine()}
    record = machine | {"runs": [dataclasses.asdict(run) for run in measured]}
    path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    draw(path.with_suffix(".png"), summaries)
