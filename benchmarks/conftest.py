"""Options, the measured limits of the machine and the closing table of ops.py."""

from __future__ import annotations

import io
import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from moefast.lm.bench import machine
from moefast.lm.bench.bandwidth import Bandwidth, measure_bandwidth, measure_peak, reader
from moefast.lm.bench.report import machine_lines, number

_REPORT = pytest.StashKey["Report"]()
_CASE_SECONDS = 2.5


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moefast")
    group.addoption(
        "--case-seconds",
        type=float,
        default=_CASE_SECONDS,
        help=f"leave out cases of which one run would take longer (default: {_CASE_SECONDS:g})",
    )
    group.addoption("--json", metavar="FILE", help="write every row, machine and versions to a file")
    group.addoption("--full", action="store_true", help="run every case, and verify every token")


def pytest_configure(config: pytest.Config) -> None:
    # One table of everything, at the end, instead of pytest-benchmark's many; -v brings those back.
    if config.getoption("benchmark_quiet", None) is False:
        config.option.benchmark_quiet = True


class Report:
    """What all cases share: how long they may take, what was measured, the limits to compare with.

    Attributes:
        bandwidth: of memory.
        read: measures it again, with the native backend's threads; None where that is not built.
        peaks: TFLOP/s of the machine, by what was done; peak: the highest, or 0 where none was measured.
        full: run and verify everything.
        case_seconds: most seconds of one run.
        rows: figures of the cases so far, or why they were left out.
    """

    def __init__(self, bandwidth: Bandwidth, peaks: dict[str, float], case_seconds: float, full: bool):
        self.bandwidth = bandwidth
        self.read = reader()
        self.peaks = peaks
        self.peak = max(peaks.values(), default=0.0)
        self.full = full
        self.case_seconds = float("inf") if full else case_seconds
        self.rows: list[dict[str, Any]] = []
        self._seconds: dict[tuple[str, ...], tuple[int, float]] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Note a case."""
        self.rows.append(row)

    def took(self, case: tuple[str, ...], tokens: int, seconds: float) -> None:
        """Note what so many tokens took."""
        self._seconds[case] = (tokens, seconds)

    def expected(self, case: tuple[str, ...], tokens: int) -> float:
        """Seconds of a run, at worst in proportion to those of fewer tokens; 0 before there are any."""
        known, seconds = self._seconds.get(case, (1, 0.0))
        return seconds * tokens / known

    def table(self) -> Table:
        """Every case in a row."""
        table = Table(title="operations", title_justify="left", title_style="bold")
        for name in ("operation", "family", "tokens", "subject"):
            table.add_column(name, justify="right" if name == "tokens" else "left", no_wrap=True)
        for name in (
            "median ms\n(min–max)",
            "MB\nmoved",
            "GB/s",
            "of band-\nwidth",
            "TFLOP/s",
            "of\npeak",
            "vs faster\nmlx-lm",
            "error",
        ):
            table.add_column(name, justify="right", no_wrap=True)
        last = None
        operations = list(dict.fromkeys(row["op"] for row in self.rows))
        for row in sorted(self.rows, key=lambda row: operations.index(row["op"])):
            case = (row["op"], row["family"], row["tokens"])
            if last is not None and case[:2] != last[:2]:
                table.add_section()
            shown = [
                str(x) if last is None or case[: i + 1] != last[: i + 1] else "" for i, x in enumerate(case)
            ]
            table.add_row(*shown, row["subject"], *self._figures(row))
            last = case
        return table

    def _figures(self, row: dict[str, Any]) -> list[str]:
        if "skipped" in row:
            return [f"[dim]{row['skipped']}[/]", *[""] * 7]
        low, high = row["low"] * 1e3, row["high"] * 1e3
        spread = f" ({number(low)}–{number(high)})" if row["rounds"] > 1 else " (1 run)"
        baseline = self._baseline(row)
        return [
            f"{number(row['seconds'] * 1e3)}{spread}",
            number(row["bytes"] / 1e6),
            number(row["gb_s"]),
            f"{row['of_bandwidth']:.1%}",
            number(row["tflop_s"]) if row["tflop_s"] else "",
            f"{row['of_peak']:.1%}" if row["tflop_s"] and row["of_peak"] else "",
            "" if baseline is None else f"{number(baseline / row['seconds'])}×",
            f"{row['error']:.1e}",
        ]

    def _baseline(self, row: dict[str, Any]) -> float | None:
        """Seconds of the faster of mlx-lm's at the same operation, layer and tokens."""
        same = [
            other["seconds"]
            for other in self.rows
            if all(other[key] == row[key] for key in ("op", "family", "tokens"))
            and other["subject"].startswith("mlx-lm")
            and "seconds" in other
        ]
        return min(same, default=None)


@pytest.fixture(scope="session")
def report(request: pytest.FixtureRequest) -> Report:
    """The session's one report."""
    config = request.config
    seconds, full = config.getoption("--case-seconds"), config.getoption("--full")
    report = Report(measure_bandwidth(), measure_peak(), seconds, full)
    config.stash[_REPORT] = report
    return report


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print the table where something was measured."""
    report = config.stash.get(_REPORT, None)
    if report is None or not report.rows:
        return
    text = io.StringIO()
    Console(file=text, width=170, highlight=False).print(report.table())
    terminalreporter.write_line("")
    for line in (*machine_lines(machine.describe()), f"bandwidth: {report.bandwidth}"):
        terminalreporter.write_line(line)
    if report.peaks:
        peaks = "; ".join(f"{what}: {peak:.2f} TFLOP/s" for what, peak in report.peaks.items())
        terminalreporter.write_line(f"peak: {peaks}")
    for line in text.getvalue().splitlines():
        terminalreporter.write_line(line.rstrip())
    if file := config.getoption("--json"):
        facts = {**machine.describe(), "bandwidth_gb_s": report.bandwidth.figures, "rows": report.rows}
        Path(file).write_text(json.dumps(facts) + "\n")
    command = shlex.join(["python", "-m", "pytest", *config.invocation_params.args])
    terminalreporter.write_line(f"to repeat: {command}")
