"""The ``moefast`` command: ``lm``, ``generate``, ``verify``, ``init-model``, ``doctor`` and ``bench``.

Each subcommand imports what it needs when it runs: ``--help`` is immediate, and ``doctor`` works without
the ``lm`` extra.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from .errors import refuse

# Packages that the "lm" extra brings, directly or through mlx-lm.
_LM_PACKAGES = {
    "huggingface_hub",
    "jinja2",
    "mlx_lm",
    "rich",
    "safetensors",
    "sentencepiece",
    "tokenizers",
    "transformers",
}

# Packages that mlx-lm's own extras bring: of which command, which extra.
_MLX_LM_EXTRAS = {"datasets": "train", "lm_eval": "evaluate", "tqdm": "train", "PIL": "vision"}

_OK, _REFUSED, _INTERRUPTED = 0, 2, 130

Run = Callable[[argparse.Namespace], int]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: arguments after the program's name; those of the process by default.

    Returns:
        The exit code: 0; 2 where an argument, a file or a missing package is at fault (one line on stderr
        says which); 130 after Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["lm"] and argv[1:] not in ([], ["-h"], ["--help"]):
        return _hand_over(argv[1:])
    try:
        parser = _parser(argv[0] if argv else None)
        arguments = parser.parse_args(argv)
        run: Run = arguments.run
        return run(arguments)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read stdout (head, less) has left. Python would complain once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _OK
    except ImportError as error:
        return _refuse(_missing(argv[0], error) or error)
    except (ValueError, OSError) as error:
        return _refuse(error)


def _hand_over(argv: list[str]) -> int:
    """``moefast lm COMMAND``: what goes wrong in mlx-lm's command, and Ctrl-C, end as they do in mlx-lm."""
    try:
        from .lm.hand_over import prepare

        run = prepare(argv)
    except (ImportError, ValueError) as error:
        return _refuse((isinstance(error, ImportError) and _missing(f"lm {argv[0]}", error)) or error)
    try:
        run()
    except ImportError as error:
        missing = _missing(f"lm {argv[0]}", error)
        if missing is None:
            raise
        return _refuse(missing)
    return _OK


def _missing(command: str, error: ImportError) -> str | None:
    """Which extra to install, where a package of one is missing."""
    package = (error.name or "").partition(".")[0]
    if package in _LM_PACKAGES:
        how = 'install moefast with its extra lm (in a checkout: pip install ".[lm]")'
        return f"{command} needs {package}: {how}"
    if package in _MLX_LM_EXTRAS:
        return f"{command} needs {package}: install mlx-lm[{_MLX_LM_EXTRAS[package]}]"
    return None


def _refuse(error: object) -> int:
    """One line, whatever the message: libraries write whole paragraphs."""
    print(f"moefast: error: {' '.join(str(error).split())}", file=sys.stderr)
    return _REFUSED


def _parser(wanted: str | None) -> argparse.ArgumentParser:
    """With all that there is to know of the command that is wanted."""
    parser = argparse.ArgumentParser(
        prog="moefast",
        description="Mixture-of-Experts layers for MLX, with interchangeable backends.",
        epilog="moefast COMMAND --help says more of a command.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_lm(commands, wanted == "lm")
    _add_generate(commands)
    _add_verify(commands)
    _add_tune(commands)
    _add_init_model(commands)
    _add_doctor(commands)
    _add_bench(commands, wanted == "bench")
    return parser


class _Version(argparse.Action):
    """Looks the version up only when asked for it."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from . import __version__

        print(f"moefast {__version__}")
        parser.exit()


def _command(commands: Any, name: str, what: str, examples: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=what,
        description=f"{what[0].upper()}{what[1:]}.",
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def _add_lm(commands: Any, wanted: bool) -> None:
    """Only its help: with a command of mlx-lm, :func:`main` has handed over before it comes here."""
    examples = ""
    if wanted:
        from .lm.hand_over import EXAMPLES as examples  # noqa: N811
        from .lm.hand_over import listing
    parser = _command(commands, "lm", "run a command of mlx-lm with its models accelerated", examples)
    parser.usage = "moefast lm COMMAND [mlx-lm's arguments ...]"
    if wanted:
        parser.description = f"{parser.description}\n\n{listing()}"
    parser.set_defaults(run=lambda _: print(parser.format_help(), end="") or _OK)


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands,
        "verify",
        "compare a model as mlx-lm runs it with the same model accelerated",
        "  moefast verify --model ./granite-4bit\n"
        "  moefast verify --model owner/name --tokens 16 --backend native --json > verify.json",
    )
    parser.add_argument("--model", required=True, help="a directory, or a Hugging Face repository id")
    parser.add_argument(
        "--tokens",
        type=int,
        default=64,
        metavar="N",
        help="tokens that the plain model generates and both are compared on (default: %(default)s)",
    )
    parser.add_argument("--prompt", "-p", help="the text before them (default: a sentence)")
    parser.add_argument(
        "--backend", default="auto", help="a backend of `moefast doctor`, or auto (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_verify)


def _verify(arguments: argparse.Namespace) -> int:
    from .lm.compare_report import run

    return run(arguments)


def _add_generate(commands: Any) -> None:
    parser = _command(
        commands,
        "generate",
        "generate text with a checkpoint",
        '  moefast generate --model ./granite-4bit --prompt "Why is the sky blue?"\n'
        "  moefast generate --model owner/name --max-tokens 500 --temp 0.7 --top-p 0.95 --seed 1\n"
        "  cat question.txt | moefast generate --model ./granite-4bit --prompt - --backend reference",
    )
    parser.add_argument("--model", required=True, help="a directory, or a Hugging Face repository id")
    parser.add_argument(
        "--prompt", "-p", default="hello", help="the text; - reads stdin (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens",
        "-m",
        type=int,
        default=100,
        metavar="N",
        help="at most N tokens (default: %(default)s)",
    )
    parser.add_argument(
        "--temp", type=float, default=0.0, help="sampling temperature; 0 is greedy (default: %(default)s)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, help="sample from this probability mass (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, help="of the sampling")
    parser.add_argument(
        "--ignore-chat-template", action="store_true", help="give the model the prompt as it is"
    )
    parser.add_argument(
        "--backend", default="auto", help="a backend of `moefast doctor`, or auto (default: %(default)s)"
    )
    parser.set_defaults(run=_generate)


def _generate(arguments: argparse.Namespace) -> int:
    from .lm.generate import run

    return run(arguments)


def _add_tune(commands: Any) -> None:
    parser = _command(
        commands,
        "tune",
        "measure which of a model's layers moefast makes faster on this machine, and remember it",
        "  moefast tune --model ./granite-4bit\n"
        "  moefast tune --model owner/name --budget 300\n"
        "  moefast tune --show\n"
        "  moefast tune --clear    # accelerate everything that can be again",
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a directory, or a Hugging Face repository id")
    what.add_argument("--show", action="store_true", help="print what is remembered for this machine")
    what.add_argument("--clear", action="store_true", help="forget it")
    parser.add_argument(
        "--budget", type=float, default=120.0, metavar="SECONDS", help="about (default: %(default)g)"
    )
    parser.add_argument(
        "--no-threads", action="store_true", help="do not try numbers of threads of the native backend"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_tune)


def _tune(arguments: argparse.Namespace) -> int:
    from .lm.tune_command import run

    return run(arguments)


def _add_init_model(commands: Any) -> None:
    parser = _command(
        commands,
        "init-model",
        "write a checkpoint of random weights that mlx-lm and moefast load",
        "  moefast init-model --family qwen2_moe --out ./tiny\n"
        "  moefast init-model --family dbrx --size layers=2 --out ./dbrx-2-layers    # real layer sizes\n"
        "  moefast init-model --family qwen2_moe --bits none --dtype float32 --out ./qwen-fp32\n"
        "  moefast init-model --family glm4_moe --mode mxfp4 --out ./glm-mxfp4",
    )
    parser.add_argument(
        "--family", required=True, help="granitemoe, glm4_moe, qwen2_moe, bailing_moe or dbrx"
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="the directory to make")
    parser.add_argument(
        "--size",
        default="tiny",
        help="tiny, small, or layers=N: N layers of the real size (default: %(default)s)",
    )
    parser.add_argument(
        "--bits", metavar="N", help="bits per weight; none or 16: unquantized (default: 4; 8 for mxfp8)"
    )
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="weights that share a scale (default: the mode's)"
    )
    parser.add_argument(
        "--mode", default="affine", help="affine, mxfp4, mxfp8 or nvfp4 (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", default="bfloat16", help="bfloat16, float16 or float32 (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace a checkpoint that is already there")
    parser.set_defaults(run=_init_model)


def _init_model(arguments: argparse.Namespace) -> int:
    from .lm.checkpoint import default_bits, init_model

    made = init_model(
        arguments.family,
        arguments.out,
        size=arguments.size,
        bits=default_bits(arguments.mode) if arguments.bits is None else _bits(arguments.bits),
        group_size=arguments.group_size,
        mode=arguments.mode,
        dtype=arguments.dtype,
        seed=arguments.seed,
        force=arguments.force,
    )
    print(
        f"{made.path}: {made.num_parameters / 1e6:,.1f} million parameters,"
        f" {made.num_bytes / 1e6:,.1f} MB in {made.num_files} files"
    )
    return _OK


def _bits(text: str) -> int | None:
    if text == "none":
        return None
    if not text.isdecimal():
        refuse("init-model", "--bits must be a number or none", repr(text))
    return int(text)


def _add_doctor(commands: Any) -> None:
    parser = _command(
        commands,
        "doctor",
        "say what is installed, which backends can run here and what auto chooses",
        "  moefast doctor\n  moefast doctor --json > report.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from .doctor import run

    return run(as_json=arguments.json)


def _add_bench(commands: Any, wanted: bool) -> None:
    """The benchmark's own arguments are added only where it is asked for: it imports mlx-lm."""
    parser = _command(
        commands,
        "bench",
        "measure tokens per second of whole models, per backend",
        "  moefast bench\n  moefast bench --help",
    )
    if wanted:
        from .lm.bench import cli as bench

        bench.add_arguments(parser)
        parser.set_defaults(run=bench.run)
