"""The tables a reader sees. All figures are in the JSON, too; nothing here computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from .family import FamilyFigures
from .measure import PHASES, Figures, Goal, baseline, ratio_to
from .profile import ATTENTION, PARTS, Cost
from .stats import Rate

# Narrower output (a pipe, a file) would fold every cell.
_WIDTH = 140
# Half a core in use by others is enough to move a figure by more than its spread.
_BUSY = 0.5


def console() -> Console:
    """Standard output, wide enough for the tables where it is not a terminal."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=_WIDTH)


def machine_lines(facts: dict[str, Any]) -> list[str]:
    """What was measured on what, for people."""
    machine, versions = facts["machine"], facts["versions"]
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory'] / 2**30:.0f} GiB, {machine['os']}; "
        f"MLX runs on the {machine['device']}",
        "  ".join(f"{name} {number}" for name, number in versions.items()),
    ]
    if machine["load"] > _BUSY:
        lines.append(f"load {machine['load']:.1f} before the start: other programs were running")
    return lines


def family_table(family: FamilyFigures, goal: Goal, roof: float) -> Table:
    """One family's figures; a second row where a subject was also measured at the baseline's counts.

    Args:
        roof: measured bandwidth of memory in GB/s.
    """
    layers = "1 layer" if family.layers == 1 else f"{family.layers} layers"
    table = Table(
        title=f"{family.family}: {layers}; decoding reads {family.read_bytes / 1e6:.0f} MB of weights per "
        f"token and follows {family.context} tokens",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    table.add_column("subject", no_wrap=True)
    for phase in PHASES:
        table.add_column(f"{phase}\ntokens", justify="right")
        table.add_column("tok/s median\n(min–max)", justify="right", no_wrap=True)
        table.add_column("vs faster\nmlx-lm", justify="right")
    table.add_column("decode\nGB/s", justify="right", no_wrap=True)
    table.add_column("peak\nMB", justify="right")
    table.add_column("error", justify="right")
    for f in family.figures:
        cells = [
            _cells(family, f, phase, wanted)
            for phase, wanted in zip(PHASES, (goal.prefill, goal.decode), strict=True)
        ]
        last = [_read(f, family.read_bytes, roof), f"{f.peak_bytes / 1e6:.0f}", _error(f)]
        for row in range(max(len(rows) for rows in cells)):
            middle = [cell for rows in cells for cell in (rows[row] if row < len(rows) else [""] * 3)]
            table.add_row(name_of(f) if row == 0 else "", *middle, *(last if row == 0 else [""] * len(last)))
    # Below rather than beside the figures: a refusal is a sentence.
    notes = [f"{name_of(f)}: {note}" for f in family.figures if (note := note_on(f))]
    table.caption = "\n".join(notes) or None
    return table


def profile_table(family: FamilyFigures, f: Figures) -> Table:
    """Where a subject's time goes: a row for each part, and the same passes in one piece below."""
    profiles = family.profiles[f.label]
    table = Table(
        title=f"{family.family}, {name_of(f)}: where the time of a forward pass goes",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("part", no_wrap=True)
    for phase, p in profiles.items():
        tokens = f"{p.tokens} tokens" if phase == "prefill" else "1 token"
        table.add_column(f"{phase}\n{tokens}: ms", justify="right", no_wrap=True)
        table.add_column("of all\nparts", justify="right", no_wrap=True)
        table.add_column("Python\nms", justify="right", no_wrap=True)
        table.add_column("calls", justify="right", no_wrap=True)
    for part in PARTS:
        if any(p.costs[part].calls for p in profiles.values()):
            cells = [_cost(p.costs[part], p.stopped) for p in profiles.values()]
            table.add_row(part, *(cell for row in cells for cell in row))
        if part == ATTENTION:
            for step in dict.fromkeys(step for p in profiles.values() for step in p.steps):
                cells = [_cost(p.steps.get(step)) for p in profiles.values()]
                table.add_row(f"  ({step} alone)", *(cell for row in cells for cell in row))
    table.add_section()
    table.add_row("all parts", *(cell for p in profiles.values() for cell in _total(p.stopped, p.python)))
    table.add_row("in one piece", *(cell for p in profiles.values() for cell in _total(p.whole, p.building)))
    return table


def _cost(cost: Cost | None, total: float | None = None) -> list[str]:
    if cost is None or not cost.calls:
        return [""] * 4
    own = cost.evaluating + cost.python
    share = "" if total is None else f"{own / total:.1%}"
    return [number(1e3 * own), share, number(1e3 * cost.python), str(cost.calls)]


def _total(seconds: float, python: float) -> list[str]:
    return [number(1e3 * seconds), "", number(1e3 * python), ""]


def name_of(f: Figures) -> str:
    """Who, in what precision: ``reference bf16``."""
    short = {"bfloat16": "bf16", "float32": "fp32"}[f.dtype]
    return f"{f.label.removesuffix(f'-{short}')} {short}"


def note_on(f: Figures) -> str:
    """Why figures are missing; empty if they are not."""
    if f.refused:
        return f"did not run: {f.refused}"
    if not f.passed:
        return "WRONG OUTPUT, not measured"
    return "; ".join(f"no {phase}: {why}" for phase, why in f.skipped.items())


def legend(families: Sequence[FamilyFigures]) -> list[str]:
    """How to read the columns."""
    verdicts = [v for x in families for f in x.figures for found in f.verdicts.values() for v in found]
    lines = [
        "tok/s: median of the runs, with the slowest and the fastest; a single run has no range.",
        "vs faster mlx-lm: over the rate of the faster of mlx-lm's own models at the same token count.",
        "decode GB/s: weights read per second, and the part of the measured bandwidth that this is.",
        "error: RMS error of the verified outputs relative to their RMS; the truth is the reference in fp32.",
        "peak: MLX's highest memory, as if the subject were alone in the process.",
        "tokens 4/512: four instead of the 512 asked for, so that the budget holds.",
    ]
    if any(x.profiles for x in families):
        lines += [
            "ms of a part: its own, not that of parts within it; an attention is without its projections.",
            "Python ms: of it until the call returned: the graph is built then. The rest is evaluation.",
            "(... alone): steps of an attention that does them in one operation, were they done one by one.",
            "all parts: with mx.eval before and after each. in one piece: the same pass as it usually runs.",
            "router: in mlx-lm up to the chosen experts; in moefast the logits, the choice is the block's.",
        ]
    if any(v.bound is None for v in verdicts):
        lines.append(
            "mlx-lm in bf16: its error is shown, not judged; it counts tokens routed otherwise, too."
        )
    return lines


def failures(families: Sequence[FamilyFigures]) -> list[str]:
    """One line for every output that was wrong."""
    return [
        f"WRONG: {x.family}, {name_of(f)}, {phase}: error {v.error.rms:.2g} RMS, {v.error.max:.2g} at most; "
        f"allowed {v.bound.rms:.2g} and {v.bound.max:.2g}"
        for x in families
        for f in x.figures
        for phase, found in f.verdicts.items()
        for v in found
        if not v.passed and v.bound is not None
    ]


def number(x: float) -> str:
    """Three digits, without an exponent: 0.0712, 1.34, 19.7, 5120."""
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}".rstrip(".")


def _cells(family: FamilyFigures, f: Figures, phase: str, wanted: int) -> list[list[str]]:
    """Rows of tokens, rate and ratio: the largest count first."""
    rates = f.rates(phase)
    ratio = ratio_to(baseline(family.figures, phase), f, phase)
    rows = []
    for tokens in sorted(rates, reverse=True):
        compared = ratio is not None and ratio.tokens == tokens
        # Counts that only another subject's comparison needed are in the JSON.
        if tokens == max(rates) or compared:
            times = f"{number(ratio.times)}×" if ratio is not None and compared else ""
            count = str(tokens) if tokens == wanted else f"{tokens}/{wanted}"
            rows.append([count, _rate(rates[tokens]), times])
    return rows or [["", "–", ""]]


def _rate(rate: Rate) -> str:
    spread = f"({number(rate.low)}–{number(rate.high)})" if rate.runs > 1 else "(1 run)"
    return f"{number(rate.median)} {spread}"


def _read(f: Figures, read_bytes: int, roof: float) -> str:
    """Weights read per second in decoding, and as a part of what memory can do."""
    rates = f.rates("decode")
    if not rates:
        return ""
    gb_s = rates[max(rates)].median * read_bytes / 1e9
    part = gb_s / roof
    return f"{number(gb_s)} ({part:.{0 if part >= 0.1 else 1}%})"


def _error(f: Figures) -> str:
    errors = [found[-1].error.rms for found in f.verdicts.values()]
    return f"{max(errors):.1e}" if errors else ""
