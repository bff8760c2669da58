"""One rank of test_acceleration_distributed.py: models that mlx-lm has sharded, accelerated before or after.

    MLX_RANK=0 MLX_HOSTFILE=hosts.json PYTHONPATH=tests python tests/distributed/accelerated.py results.jsonl

See worker.py for how ranks keep together.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm_models import MODELS, Tiny, build, tokens

import moefast
from distributed.worker import Check, Group, run
from moefast.testing import assert_logits_close

# Module -> bits of its stacks.
SHARDED = {
    "deepseek_v3": None,  # a shared expert
    "deepseek_v41": 4,  # a sum in float32
    "glm4_moe": 4,
    "gpt_oss": None,  # biases
    "kimi_k3": 4,  # a norm and a projection behind the experts
    "longcat_flash": None,  # experts that return their input
    "qwen3_5": 4,  # a gated shared expert
    "step3p5": None,
}
FAMILIES = tuple(next(tiny for tiny in MODELS if tiny.module == name) for name in SHARDED)


def logits(model: nn.Module) -> mx.array:
    y = model(tokens(2, 12))
    mx.eval(y)
    return y


def model_of(tiny: Tiny, bits: int | None) -> nn.Module:
    """With quantized stacks: of other layers two ranks could not share a quantization group."""
    model = build(tiny)
    if bits is not None:
        nn.quantize(model, 64, bits, class_predicate=lambda _, layer: isinstance(layer, SwitchLinear))
    return model


def accelerated(tiny: Tiny, bits: int | None, first: str, group: Group) -> None:
    alone = logits(model_of(tiny, bits))
    model = model_of(tiny, bits)
    if first == "shard":
        model.shard(group)
        stock = logits(model)
    report = moefast.accelerate(model, backend="native")
    assert report.accelerated, str(report)
    if first == "accelerate":
        model.shard(group)
    together = logits(model)
    assert_logits_close(together, alone, layers=2 * tiny.layers, hidden=64)
    moefast.restore(model)
    restored = logits(model)
    if first == "shard":
        assert mx.array_equal(restored, stock).item()
    assert_logits_close(restored, alone, layers=2 * tiny.layers, hidden=64)


CHECKS: dict[str, Check] = {
    f"{tiny}-{first} first": partial(accelerated, tiny, SHARDED[tiny.module], first)
    for tiny in FAMILIES
    for first in ("accelerate", "shard")
}


if __name__ == "__main__":
    run(CHECKS, Path(sys.argv[1]))
