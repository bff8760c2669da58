"""What one MoE block costs in Python, backend by backend: building its graph, at one token.

    python benchmarks/python_cost.py
    python benchmarks/python_cost.py --calls 5000 --json cost.json

Nothing is evaluated. Launches of the ``metal`` backend are stubbed: what MLX takes to make a node of the
graph for each (some 10 us on the machine this was written on) comes on top, and is MLX's. The block is
Qwen2-MoE's: 60 experts, 4 a token, a gated shared expert, 4 bits; small, since sizes do not matter here. Each
figure is the best of nine rounds.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn

import moefast
from moefast import RouterSpec, nn, use_backend
from moefast.backends.metal import METAL, launch

ROUNDS = 9
SPEC = RouterSpec(num_experts=60, top_k=4)
HIDDEN, WIDTH = 128, 128


def block() -> nn.MoE:
    """A quantized block, evaluated."""
    made = nn.MoE(SPEC, HIDDEN, WIDTH, shared_width=WIDTH, shared_gate=True)
    mlx.nn.quantize(made, group_size=64, bits=4)
    made.set_dtype(mx.bfloat16)
    mx.eval(made.eval().parameters())
    return made


@contextmanager
def stubbed_launches() -> Iterator[None]:
    """Within the block ``metal`` can be chosen, and its launches give arrays that were made before."""
    made: dict[str, list[mx.array]] = {}

    def stub(self: launch.Function, inputs: Sequence[mx.array], **how: Any) -> list[mx.array]:
        if self.name not in made:
            made[self.name] = [mx.zeros(*output) for output in how["outputs"]]
            mx.eval(made[self.name])
        return made[self.name]

    here = {"unavailable": None}
    with (
        mock.patch.object(launch.Function, "__call__", stub),
        mock.patch.dict(METAL.__dict__, here),
        launch.emulation("run"),
    ):
        yield


def microseconds(call: Callable[[], Any], calls: int) -> float:
    """Of one call, the best of a few rounds."""
    best = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return 1e6 * best


def measure(calls: int) -> dict[str, dict[str, float]]:
    """backend -> ``block``, and ``router``: the part of it that makes the logits."""
    layer, x = block(), mx.ones((1, 1, HIDDEN), mx.bfloat16)
    figures = {}
    for backend in ("reference", "native", "metal"):
        with stubbed_launches() if backend == "metal" else use_backend("auto"):
            if moefast.backends()[backend] is not None and backend != "metal":
                continue
            with use_backend(backend):
                figures[backend] = {
                    "block": microseconds(lambda: layer(x), calls),
                    "router": microseconds(lambda: layer.gate.logits(x), calls),
                }
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python benchmarks/python_cost.py --calls 5000",
    )
    parser.add_argument("--calls", type=int, default=1000, help="calls of a round (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the JSON to a file, too")
    options = parser.parse_args()
    figures = measure(options.calls)
    print(f"{'backend':10} {'block, us':>10} {'of it the router, us':>22}")
    for backend, of in figures.items():
        print(f"{backend:10} {of['block']:10.1f} {of['router']:22.1f}")
    found = {"figures": figures, "mlx": str(mx.__version__), "python": platform.python_version()}  # type: ignore[attr-defined]
    print(json.dumps(found))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
