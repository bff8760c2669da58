"""``moefast lm``: mlx-lm's own commands, with the models they load accelerated."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from ..acceleration.hook import install, uninstall
from ..errors import refuse

# What they do, in a word, for the list.
ACCELERATED = {
    "generate": "text, once",
    "chat": "a conversation in the terminal",
    "server": "an HTTP server with OpenAI's interface",
    "benchmark": "tokens per second",
    "evaluate": "scores in lm-eval's tasks",
    "perplexity": "perplexity on a data set",
    "cache_prompt": "a prompt's cache, for later",
    "lora": "fine-tuning: validation runs accelerated, training as in mlx-lm",
}

# They write weights, or none of their business is running a model.
UNTOUCHED = ("convert", "fuse", "awq", "dwq", "dynamic_quant", "gptq", "upload", "share", "manage")

# Adapters that it writes are for mlx-lm's names.
_KEEPS_NAMES = ("lora",)

EXAMPLES = """\
  moefast lm generate --model ./granite-4bit --prompt "Why is the sky blue?"
  moefast lm server --model owner/name --port 8080
  moefast lm benchmark --model ./granite-4bit -p 512 -g 128
  MOEFAST=0 moefast lm benchmark --model ./granite-4bit -p 512 -g 128    # the same without moefast
  moefast lm chat --help                                                 # mlx-lm's own help"""


def listing() -> str:
    """The commands, for ``moefast lm --help``."""
    width = max(map(len, ACCELERATED))
    return "\n".join(
        [
            "accelerated:",
            *(f"  {name:{width}}  {what}" for name, what in ACCELERATED.items()),
            "as mlx-lm has them (what they write loads in stock mlx-lm):",
            f"  {', '.join(UNTOUCHED)}",
        ]
    )


def prepare(argv: Sequence[str]) -> Callable[[], None]:
    """One of mlx-lm's commands, ready to run in this process: it reads its arguments from ``sys.argv`` and
    ends as it likes.

    Args:
        argv: the command and its arguments, which are mlx-lm's.

    Raises:
        ValueError: no such command, or ``MOEFAST_BACKEND`` names no backend.
        ImportError: a package of an extra is missing.
    """
    command, *arguments = argv
    if command not in ACCELERATED and command not in UNTOUCHED:
        refuse("lm", f"the command must be one of {(*ACCELERATED, *UNTOUCHED)}", repr(command))
    if command in UNTOUCHED:
        uninstall()
    elif not install(dbrx=command not in _KEEPS_NAMES):
        print(f"moefast: MOEFAST=0: {command} runs as in mlx-lm", file=sys.stderr)
    from mlx_lm import cli

    # It takes the command away, and argparse shows the rest of the first.
    sys.argv = [f"moefast lm {command}", command, *arguments]
    run: Callable[[], None] = cli.main
    return run
