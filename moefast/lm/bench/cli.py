"""``moefast bench``: the command."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx

from ...backends import backends, registry
from ...models import FAMILIES
from . import machine, plot, report
from .bandwidth import measure_bandwidth
from .family import ACCELERATED, STOCK, FamilyFigures, Settings, run_family, weight_of
from .measure import Goal
from .plan import share

_DESCRIPTION = """\
Tokens per second of language models with moefast's backends, with mlx-lm alone, and with mlx-lm's models
after moefast.accelerate ("accelerated").

Models have the real layer sizes, random weights and the first layers only (--layers): nothing is
downloaded. Every output is compared with the reference before it is timed. Subjects take turns, so that a
busy machine disturbs all alike, and a slow one gets fewer tokens; ratios are between equal token counts.
The last line printed is one JSON object with everything."""

_EXAMPLES = """\
examples:
  %(prog)s                                    all five families, under four minutes
  %(prog)s --families qwen2_moe dbrx --layers 4 --budget 300
  %(prog)s --subjects mlx-lm-fp32 reference   two of the subjects
  %(prog)s --plot bench.png --json bench.json
  %(prog)s --families qwen2_moe --profile    where the time goes, too

exit status: 0; 1 if an output was wrong; 2 for bad arguments."""

_FILL = 2 / 3  # between the same time for every family (0) and time in proportion to its bytes (1)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.description = _DESCRIPTION
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    available = [name for name, reason in backends().items() if reason is None]
    known = [*STOCK, *ACCELERATED, *registry.names()]
    default = [*STOCK, "accelerated-bf16", *available]
    parser.add_argument("--families", nargs="+", choices=FAMILIES, default=list(FAMILIES), metavar="NAME",
                        help=f"which models: {', '.join(FAMILIES)} (default: all)")  # fmt: skip
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--layers", type=positive, default=2, metavar="N",
                      help="layers of the real model (default: 2)")  # fmt: skip
    size.add_argument("--size", choices=("tiny", "small"),
                      help="shrunken models instead of the real sizes, to try the benchmark out")  # fmt: skip
    parser.add_argument("--bits", type=int, choices=(2, 3, 4, 5, 6, 8), default=4,
                        help="of quantized weights, in groups of 64 (default: 4)")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N",
                        help="tokens of a prefill, time permitting (default: 512)")  # fmt: skip
    parser.add_argument("--decode-tokens", type=positive, default=32, metavar="N",
                        help="tokens decoded in a run, time permitting (default: 32)")  # fmt: skip
    parser.add_argument("--budget", type=_seconds, default=200.0, metavar="SECONDS",
                        help="for everything, about (default: 200)")  # fmt: skip
    parser.add_argument("--repeats", type=positive, default=5, metavar="N",
                        help="runs of each figure, time permitting (default: 5)")  # fmt: skip
    parser.add_argument("--subjects", nargs="+", metavar="NAME", default=default,
                        choices=known,
                        help=f"what to measure: {', '.join(known)} "
                             f"(default here: {' '.join(default)})")  # fmt: skip
    parser.add_argument("--seed", type=not_negative, default=0, help="of weights and prompts (default: 0)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the JSON to a file, too")
    parser.add_argument("--profile", action="store_true",
                        help="show, too, where the time of each subject goes, part by part")  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="draw the figures")
    parser.set_defaults(program=parser.prog)


def main(argv: Sequence[str] | None = None, *, prog: str = "moefast bench") -> int:
    """Parse arguments and run; ``prog`` is what the user typed to get here. Returns the exit status."""
    parser = argparse.ArgumentParser(prog)
    add_arguments(parser)
    return run(parser.parse_args(argv))


def run(args: argparse.Namespace) -> int:
    """Measure what :func:`add_arguments` declared; print tables and JSON. Returns the exit status."""
    if problem := _problem_of(args):
        print(f"{args.program}: {problem}", file=sys.stderr)
        return 2
    end = time.perf_counter() + args.budget
    facts = machine.describe()
    bandwidth = measure_bandwidth()
    settings = Settings(
        size=args.size or f"layers={args.layers}",
        bits=args.bits,
        goal=Goal(args.prompt_tokens, args.decode_tokens, args.repeats),
        subjects=list(dict.fromkeys(args.subjects)),
        seed=args.seed,
        profile=args.profile,
    )
    out = report.console()
    for line in (*report.machine_lines(facts), f"bandwidth: {bandwidth}"):
        out.print(line)
    absent = {name: reason for name, reason in backends().items() if reason is not None}
    for name, reason in absent.items():
        out.print(f"backend {name} is not available: {reason}")
    families = list(dict.fromkeys(args.families))
    weights = [weight_of(family, settings) ** _FILL for family in families]
    found: list[FamilyFigures] = []
    with _progress(len(families)) as (say, step):
        for i, family in enumerate(families):
            seconds = share(weights[i:], end - time.perf_counter())
            found.append(run_family(family, settings, seconds, progress=partial(say, family)))
            step()
            mx.clear_cache()  # the next family's arrays have other sizes
            out.print()
            out.print(report.family_table(found[-1], settings.goal, bandwidth.roof))
            for figures in found[-1].figures:
                if figures.label in found[-1].profiles:
                    out.print()
                    out.print(report.profile_table(found[-1], figures))
    out.print()
    for line in (*report.legend(found), *report.failures(found)):
        out.print(line)
    command = repro(args)
    out.print(f"\nto repeat: {command}", soft_wrap=True)
    facts["machine"]["load_after"] = machine.load()
    result = {
        "benchmark": "tokens",
        **facts,
        "bandwidth_gb_s": bandwidth.figures,
        "command": command,
        "settings": {
            "size": settings.size,
            "bits": settings.bits,
            "group_size": 64,
            "prompt_tokens": args.prompt_tokens,
            "decode_tokens": args.decode_tokens,
            "repeats": args.repeats,
            "budget": args.budget,
            "seed": args.seed,
            "profile": args.profile,
        },
        "unavailable": absent,
        "families": [x.as_json() for x in found],
        "passed": all(x.passed for x in found),
    }
    if args.plot is not None:
        plot.save(args.plot, found, facts)
    line = json.dumps(rounded(result))
    if args.json is not None:
        args.json.write_text(line + "\n")
    print(line, flush=True)
    return 0 if result["passed"] else 1


def rounded(value: Any) -> Any:
    """JSON with six digits: more would suggest that they mean something."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item) for item in value]
    return value


def _problem_of(args: argparse.Namespace) -> str | None:
    """What would spoil the end of a long run."""
    for path in (args.json, args.plot):
        if path is not None and not path.absolute().parent.is_dir():
            return f"{path.parent} must be a directory that exists"
    if args.plot is not None and args.plot.suffix.lower() != ".png":
        return f"--plot must end in .png, got {args.plot.name}"
    if args.plot is not None and find_spec("matplotlib") is None:
        return "--plot needs matplotlib: moefast's extra bench (in a checkout: pip install '.[bench]')"
    return None


def repro(args: argparse.Namespace) -> str:
    """The command that measures the same again, every setting spelled out."""
    words = [*args.program.split(), "--families", *args.families]
    words += ["--size", args.size] if args.size else ["--layers", str(args.layers)]
    for name in ("bits", "prompt_tokens", "decode_tokens", "budget", "repeats", "seed"):
        value = getattr(args, name)
        words += ["--" + name.replace("_", "-"), f"{value:g}" if isinstance(value, float) else str(value)]
    words += ["--profile"] * args.profile
    return shlex.join([*words, "--subjects", *args.subjects])


@contextmanager
def _progress(families: int) -> Iterator[tuple[Callable[[str, str], None], Callable[[], None]]]:
    """A bar on standard error, where that is a terminal. Yields what to call for a text and a family."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    err = Console(stderr=True)
    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=families)

        def say(family: str, text: str) -> None:
            bar.update(task, description=f"{family}: {text}")

        yield say, lambda: bar.advance(task)


def positive(text: str) -> int:
    """An option's count, at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def not_negative(text: str) -> int:
    """An option's count, at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a positive number of seconds, got {text}")
    return value


if __name__ == "__main__":
    sys.exit(main(prog="python -m moefast.lm.bench.cli"))
