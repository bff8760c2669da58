"""The figures as bars: one panel per phase, one group per family."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from .family import FamilyFigures
from .measure import PHASES
from .report import number
from .stats import Rate

# Baselines in greys, moefast in colours, told apart without seeing red and green.
_GREYS = ("#a6a6a6", "#5f5f5f")
_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
# Rates further apart than this get a logarithmic axis: the smaller bars would vanish.
_LOG_FROM = 8.0


def save(path: str | os.PathLike[str], families: Sequence[FamilyFigures], facts: dict[str, Any]) -> None:
    """Write a PNG.

    Each bar is the median at the subject's largest token count, with the range of its runs; the number of
    tokens stands in its foot, since bars of different counts must not be divided by one another.
    """
    # Imported here: a benchmark without --plot needs no matplotlib. Agg: no display is needed either.
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    labels = list(dict.fromkeys(f.label for x in families for f in x.figures))
    colours = _colours(labels)
    width = max(8.0, 2.2 + 0.55 * len(families) * max(1, len(labels)))
    figure, axes = pyplot.subplots(len(PHASES), 1, figsize=(width, 8), layout="constrained")
    for axis, phase in zip(axes, PHASES, strict=True):
        _panel(axis, phase, families, labels, colours)
    figure.supxlabel(
        "whiskers: slowest and fastest run; in the bar: tokens of a run (ratios only between equal counts)",
        fontsize=8,
        color="#505050",
    )
    axes[0].legend(ncols=max(1, len(labels)), loc="lower left", bbox_to_anchor=(0, 1.08), frameon=False)
    machine, versions = facts["machine"], facts["versions"]
    figure.suptitle(
        f"moefast {versions['moefast']}, mlx {versions['mlx']}, mlx-lm {versions['mlx-lm']} on "
        f"{machine['cpu']}, {machine['cores']} cores, {machine['device']}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150, format="png")
    pyplot.close(figure)


def _panel(
    axis: Any, phase: str, families: Sequence[FamilyFigures], labels: list[str], colours: dict[str, str]
) -> None:
    medians = [rates[max(rates)].median for x in families for f in x.figures if (rates := f.rates(phase))]
    log = bool(medians) and max(medians) > _LOG_FROM * min(medians)
    floor = 10 ** math.floor(math.log10(min(medians)) - 0.5) if log else 0.0
    width = 0.8 / len(labels)
    for label in labels:  # for the legend, whatever was measured
        axis.bar(0, 0, color=colours[label], label=label)
    for i, family in enumerate(families):
        for f in family.figures:
            x = i + (labels.index(f.label) - (len(labels) - 1) / 2) * width
            _bar(axis, x, width, f.rates(phase), floor, colours[f.label])
    if log:
        axis.set_yscale("log")
        axis.set_ylim(floor, max(medians) * 3)
        axis.yaxis.set_major_formatter("{x:g}")
    else:
        axis.margins(y=0.15)
    layers = ["1 layer" if x.layers == 1 else f"{x.layers} layers" for x in families]
    axis.set_xticks(
        range(len(families)), [f"{x.family}\n{text}" for x, text in zip(families, layers, strict=True)]
    )
    axis.set_ylabel("tokens per second" + (" (log)" if log else ""))
    axis.set_title(phase, loc="left", fontweight="bold")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", lw=0.4, alpha=0.5)
    axis.set_axisbelow(True)


def _bar(axis: Any, x: float, width: float, rates: dict[int, Rate], floor: float, colour: str) -> None:
    """One subject of one family, from ``floor`` up, at its largest token count."""
    foot = {"rotation": 90, "ha": "center", "va": "bottom", "fontsize": 7}
    foot |= {"transform": axis.get_xaxis_transform()}
    if not rates:
        axis.text(x, 0.02, "not run", color="#505050", **foot)
        return
    tokens = max(rates)
    rate = rates[tokens]
    spread = [[rate.median - rate.low], [rate.high - rate.median]] if rate.runs > 1 else None
    whiskers = {"capsize": 2, "lw": 0.8}
    axis.bar(
        x,
        rate.median - floor,
        bottom=floor,
        width=0.94 * width,
        color=colour,
        yerr=spread,
        error_kw=whiskers,
    )
    above = {"xytext": (0, 3), "textcoords": "offset points", "ha": "center", "va": "bottom"}
    axis.annotate(number(rate.median), (x, rate.high), fontsize=8, **above)
    axis.text(x, 0.02, f"{tokens} tok", color="white", **foot)


def _colours(labels: Sequence[str]) -> dict[str, str]:
    stock = [label for label in labels if label.startswith("mlx-lm")]
    others = [label for label in labels if label not in stock]
    return {
        **{label: _GREYS[i % len(_GREYS)] for i, label in enumerate(stock)},
        **{label: _COLOURS[i % len(_COLOURS)] for i, label in enumerate(others)},
    }
