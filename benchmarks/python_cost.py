"""What one MoE block costs in Python, backend by backend: building its graph, at one token.

    python benchmarks/python_cost.py
    python benchmarks/python_cost.py --seconds 10 --json cost.json

Nothing is evaluated. Launches of the ``metal`` backend are stubbed: what MLX takes to make a node of the
graph for each comes on top, and is MLX's. The router is a product by MLX there, and counted apart: most of it
is MLX's, too. The block is Qwen2-MoE's, moefast's own and mlx-lm's after ``moefast.accelerate``: 60 experts,
4 a token, a gated shared expert, 4 bits; small, since sizes do not matter here. Each figure is the best of
many short rounds, so that some of them are undisturbed.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn
from mlx_lm.models import qwen2_moe

import moefast
from moefast import RouterSpec, nn, use_backend
from moefast.backends.metal import METAL
from moefast.registry import device_name

CALLS = 100  # of a round
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
    """Within the block ``metal`` runs as on a GPU, but MLX's kernel objects give arrays that were made
    before."""

    def metal_kernel(**construction: Any) -> Callable[..., list[mx.array]]:
        outputs: list[mx.array] = []

        def launched(
            *,
            inputs: Sequence[mx.array],
            output_shapes: Sequence[tuple[int, ...]],
            output_dtypes: Sequence[mx.Dtype],
            grid: tuple[int, ...],
            threadgroup: tuple[int, ...],
            template: Any,
        ) -> list[mx.array]:
            if not outputs:
                outputs.extend(map(mx.zeros, output_shapes, output_dtypes))
                mx.eval(outputs)
            return outputs

        return launched

    def on_gpu() -> str:
        device_name()
        return "gpu"

    with ExitStack() as patches:
        for module, name, value in (
            ("mlx.core.fast", "metal_kernel", metal_kernel),
            ("moefast.ops.quantized_matmul", "device_name", on_gpu),
            ("moefast.backends.metal.products", "device_name", on_gpu),
            ("moefast.backends.metal.refusals", "here", lambda: mock.ANY),
            ("moefast.backends.metal.refusals", "_verdict", lambda *_: None),  # none was made here
            ("moefast.backends.metal.of_layers", "here", device_name),  # arrays are this machine's
        ):
            patches.enter_context(mock.patch.object(import_module(module), name, value))
        patches.enter_context(mock.patch.dict(METAL.__dict__, {"unavailable": None}))
        yield


def microseconds(call: Callable[[], Any], seconds: float) -> float:
    """Of one call, in the best of the rounds that this time has room for."""
    best, end = float("inf"), time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        for _ in range(CALLS):
            call()
        best = min(best, (time.perf_counter() - start) / CALLS)
    return 1e6 * best


def measure(seconds: float) -> dict[str, dict[str, float]]:
    """backend -> ``block``; ``router``, what makes its logits; and the ``rest``: the block with a router that
    has made them before."""
    layer, x = block(), mx.ones((1, 1, HIDDEN), mx.bfloat16)
    router = layer.gate
    figures = {}
    for backend in ("reference", "native", "metal"):
        with stubbed_launches() if backend == "metal" else use_backend("auto"):
            if moefast.backends()[backend] is not None and backend != "metal":
                continue
            with use_backend(backend):
                whole = microseconds(lambda: layer(x), seconds)
                product = microseconds(lambda: router.logits(x), seconds)
                logits = router.logits(x)
                with mock.patch.object(nn.Router, "logits", lambda self, x: logits):  # noqa: B023, PT008
                    rest = microseconds(lambda: layer(x), seconds)
                figures[backend] = {"block": whole, "router": product, "rest": rest}
                if backend != "reference":
                    figures[f"{backend}, accelerated"] = measure_accelerated(x, seconds)
    return figures


def measure_accelerated(x: mx.array, seconds: float) -> dict[str, float]:
    """The same of mlx-lm's block after ``moefast.accelerate``, on the default backend."""
    layer = stock_block()
    report = moefast.accelerate(layer)
    assert [entry.what for entry in report.accelerated] == ["block"], report
    whole = microseconds(lambda: layer(x), seconds)
    product = microseconds(lambda: layer.gate(x), seconds)
    logits = layer.gate(x)
    with mock.patch.object(type(layer), "moefast_logits", lambda self, x: logits):  # noqa: PT008
        rest = microseconds(lambda: layer(x), seconds)
    return {"block": whole, "router": product, "rest": rest}


def stock_block() -> Any:
    """mlx-lm's block of the same sizes and format."""
    args = qwen2_moe.ModelArgs(
        model_type="qwen2_moe",
        hidden_size=HIDDEN,
        num_hidden_layers=1,
        intermediate_size=WIDTH,
        num_attention_heads=1,
        num_experts_per_tok=SPEC.top_k,
        num_experts=SPEC.num_experts,
        moe_intermediate_size=WIDTH,
        shared_expert_intermediate_size=WIDTH,
        rms_norm_eps=1e-6,
        vocab_size=1,
    )
    made = qwen2_moe.Qwen2MoeSparseMoeBlock(args)
    mlx.nn.quantize(made, group_size=64, bits=4)
    made.set_dtype(mx.bfloat16)
    mx.eval(made.eval().parameters())
    return made


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        epilog="example: python benchmarks/python_cost.py --seconds 10",
    )
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the JSON to a file, too")
    options = parser.parse_args()
    figures = measure(options.seconds)
    print(f"{'backend':20} {'block, us':>10} {'router, us':>11} {'the rest, us':>13}")
    for backend, of in figures.items():
        print(f"{backend:20} {of['block']:10.1f} {of['router']:11.1f} {of['rest']:13.1f}")
    found = {"figures": figures, "mlx": str(mx.__version__), "python": platform.python_version()}  # type: ignore[attr-defined]
    print(json.dumps(found))
    if options.json:
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=2)


if __name__ == "__main__":
    main()
