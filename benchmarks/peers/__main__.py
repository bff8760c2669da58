"""Tokens per second of moefast and of llama.cpp on the same models, with the same weights."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from gguf_names import ARCHITECTURES
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from subjects import LlamaCpp, Moefast, Remote, keep_busy

from moefast.lm.bench import machine
from moefast.lm.bench.cli import not_negative, positive
from moefast.lm.bench.report import console, machine_lines
from moefast.lm.presets import preset
from moefast.machine import cores, release_of

_DESCRIPTION = """\
Tokens per second of moefast (through mlx-lm) and of llama.cpp, on the same models with the same random
weights. llama.cpp reads them from a GGUF file that is written first. Both run in processes of their own and
by turns; what is compared are medians."""

_EXAMPLES = """\
examples:
  %(prog)s                                       the five models' first two layers
  %(prog)s --families qwen2_moe --layers 4 --beside 1
                                                 beside a program that wants one of the cores, too
  %(prog)s --families granitemoe --layers 6 --set hidden_size=2048 intermediate_size=1408 \\
      num_local_experts=60 num_experts_per_tok=4 num_attention_heads=16 num_key_value_heads=4 \\
      vocab_size=8192                            a model of any size, as a family has it

llama.cpp comes with: pip install '.[peers]' (it is compiled for this machine: minutes)
exit status: 0; 1 if the two disagree about the next token's logits; 2 for bad arguments."""

# How alike the logits of the two are at least: the cosine between them, the median of some prompts. Rounding
# activations to 8 bits, and in q4_0 weights to other values, changes them, and now and then an expert.
_ALIKE = {"q4_0": 0.9, "q4_1": 0.98, "f32": 0.999}
_PROMPTS = 6
_SEED = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmark; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    missing = [name for name in ("gguf", "llama_cpp") if find_spec(name) is None]
    if missing:
        parser.error(f"{' and '.join(missing)} must be installed: pip install '.[peers]'")
    os.environ["MOEFAST_THREADS"] = str(args.threads)
    facts = machine.describe()
    facts["versions"]["llama-cpp-python"] = release_of("llama-cpp-python") or "unknown"
    out = console()
    for line in machine_lines(facts):
        out.print(line)
    rows: list[dict[str, Any]] = []
    for family in args.families:
        config = {**preset(family, f"layers={args.layers}"), **dict(args.set)}
        found = _family(config, args)
        out.print()
        out.print(_table(config, found, args))
        rows += found
    command = shlex.join(["python", "benchmarks/peers", *(sys.argv[1:] if argv is None else argv)])
    out.print(f"\nto repeat: {command}", soft_wrap=True)
    passed = all(row["alike"] >= _ALIKE[row["form"]] for row in rows if row["form"])
    line = json.dumps({"benchmark": "peers", **facts, "command": command, "rows": rows, "passed": passed})
    if args.json is not None:
        args.json.write_text(line + "\n")
    return 0 if passed else 1


def _family(config: Mapping[str, Any], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure one model: a row for each subject."""
    random = np.random.default_rng(_SEED)

    def tokens(count: int) -> list[int]:
        return [int(token) for token in random.integers(0, config["vocab_size"], count)]

    subjects: dict[str, Remote] = {}
    with _progress() as say, tempfile.TemporaryDirectory(dir=args.directory) as directory:
        try:
            say(f"{config['model_type']}: drawing weights")
            ours = subjects["moefast"] = Remote(Moefast, config, _SEED)
            for form in args.forms:
                say(f"{config['model_type']}: {form}")
                path = Path(directory) / f"{form}.gguf"
                ours("save", path, form)
                length = max(args.prompt_tokens, args.context + args.decode_tokens) + 2
                subjects[f"llama.cpp {form}"] = Remote(LlamaCpp, path, args.threads, length)
            prompts = [tokens(2 + i) for i in range(_PROMPTS)]
            logits = {name: [subject("logits", p) for p in prompts] for name, subject in subjects.items()}
            rows = {
                name: {
                    "family": config["model_type"],
                    "subject": name,
                    "form": name.partition(" ")[2],
                    "alike": statistics.median(map(_cosine, logits["moefast"], logits[name])),
                    "prefill": [],
                    "decode": [],
                    "decode_beside": [],
                }
                for name in subjects
            }
            prompt, context = tokens(args.prompt_tokens), tokens(args.context)
            allowed: list[float] = []
            for turn in range(args.rounds + 1):
                say(f"{config['model_type']}: round {turn} of {args.rounds}")
                for name in _turned(list(subjects), turn):
                    allowed.append(ours("allowed"))
                    prefill = args.prompt_tokens / subjects[name]("prefill", prompt)
                    decode = args.decode_tokens / subjects[name]("decode", context, args.decode_tokens)
                    if turn:  # the first round warms up
                        rows[name]["prefill"].append(prefill)
                        rows[name]["decode"].append(decode)
            if args.beside:
                with _others(args.beside):
                    for turn in range(args.rounds):
                        say(f"{config['model_type']}: round {turn + 1} of {args.rounds} beside others")
                        for name in _turned(list(subjects), turn):
                            seconds = subjects[name]("decode", context, args.decode_tokens)
                            rows[name]["decode_beside"].append(args.decode_tokens / seconds)
            rows["moefast"]["allowed"] = statistics.median(allowed)
            return list(rows.values())
        finally:
            for subject in subjects.values():
                subject.close()


def _turned(names: list[str], turn: int) -> list[str]:
    """First in one round, last in the next."""
    return names if turn % 2 else names[::-1]


def _cosine(a: Any, b: Any) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


@contextmanager
def _others(count: int) -> Iterator[None]:
    """Other programs, each of which wants a core."""
    context = multiprocessing.get_context("spawn")
    programs = [context.Process(target=keep_busy, daemon=True) for _ in range(count)]
    for program in programs:
        program.start()
    try:
        yield
    finally:
        for program in programs:
            program.kill()
            program.join()


def _table(config: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], args: argparse.Namespace) -> Table:
    allowed = rows[0]["allowed"]
    table = Table(
        title=f"{config['model_type']}: tokens per second with {args.threads} threads; memory allows "
        f"{allowed:.0f} to be decoded",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("subject", no_wrap=True)
    heads = {"prefill": f"prefill {args.prompt_tokens}", "decode": f"decode after {args.context}"}
    if args.beside:
        heads["decode_beside"] = f"decode beside {args.beside} busy"
    for head in heads.values():
        table.add_column(f"{head}\nmedian (quartiles)", justify="right", no_wrap=True)
        table.add_column("moefast's\nis times", justify="right")
    table.add_column("logits\nalike", justify="right")
    for row in rows:
        cells = []
        for phase in heads:
            low, median, high = np.percentile(row[phase], [25, 50, 75])
            ratio = "" if row is rows[0] else f"{statistics.median(rows[0][phase]) / median:.2f}"
            cells += [f"{median:.4g} ({low:.4g}–{high:.4g})", ratio]
        table.add_row(row["subject"], *cells, "" if row is rows[0] else f"{row['alike']:.4f}")
    return table


@contextmanager
def _progress() -> Iterator[Any]:
    err = Console(stderr=True)
    with Progress(console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda text: bar.update(task, description=text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/peers",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    families = list(ARCHITECTURES)
    parser.add_argument("--families", nargs="+", choices=families, default=families, metavar="NAME",
                        help=f"which models: {', '.join(families)} (default: all)")  # fmt: skip
    parser.add_argument("--layers", type=positive, default=2, metavar="N",
                        help="layers of the real model (default: 2)")  # fmt: skip
    parser.add_argument("--set", nargs="+", type=_setting, default=[], metavar="FIELD=VALUE",
                        help="other values in the model's configuration")  # fmt: skip
    parser.add_argument("--forms", nargs="+", choices=list(_ALIKE), default=["q4_0"], metavar="NAME",
                        help="llama.cpp's weights: q4_0 (its fastest; quantized anew), q4_1 (the same "
                             "values as here) or f32 (default: q4_0)")  # fmt: skip
    parser.add_argument("--threads", type=positive, default=cores(), metavar="N",
                        help=f"of both (default: {cores()}, one per core)")  # fmt: skip
    parser.add_argument("--prompt-tokens", type=positive, default=512, metavar="N",
                        help="tokens of a prefill (default: 512)")  # fmt: skip
    parser.add_argument("--context", type=positive, default=32, metavar="N",
                        help="tokens that decoding follows (default: 32)")  # fmt: skip
    parser.add_argument("--decode-tokens", type=positive, default=40, metavar="N",
                        help="tokens decoded in a run (default: 40)")  # fmt: skip
    parser.add_argument("--rounds", type=positive, default=7, metavar="N",
                        help="runs of each figure (default: 7)")  # fmt: skip
    parser.add_argument("--beside", type=not_negative, default=0, metavar="N",
                        help="decode beside so many other programs, too, that want a core each")  # fmt: skip
    parser.add_argument("--directory", type=Path, metavar="DIR",
                        help="for the GGUF files (default: where temporary files are)")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's figures to a file")
    return parser


def _setting(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"must be FIELD=VALUE, got {text}")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value


if __name__ == "__main__":
    sys.exit(main())
