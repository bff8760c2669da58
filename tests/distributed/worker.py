"""One rank of test_models_distributed.py: runs every check with its peers, writes a line per check.

    MLX_RANK=0 MLX_HOSTFILE=hosts.json PYTHONPATH=tests python tests/distributed/worker.py results.jsonl

A check compares what the group computes with what this process computes alone. All ranks run all checks in
the same order; comparisons come after the communication, so that one that fails leaves no rank waiting.
"""

from __future__ import annotations

import copy
import json
import sys
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten
from model_builders import Weights, ours, parameters, prefill_and_decode, tokens
from model_cases import FULL, Case, Config, sizes

from moefast import RouterSpec
from moefast.nn import MoE
from moefast.testing import assert_gradients_close, assert_logits_close

Group = mx.distributed.Group
Check = Callable[[Group], None]


def wide(config: Config) -> Config:
    """The same with sizes that leave each of two ranks a whole quantization group of 64."""
    if config["model_type"] == "dbrx":
        return {**config, "d_model": 128, "ffn_config": {**config["ffn_config"], "ffn_hidden_size": 128}}
    widths = {k: 128 for k in config if k.endswith(("intermediate_size", "hidden_size"))}
    return {**config, **widths}


def logits_of(model: nn.Module) -> mx.array:
    logits = prefill_and_decode(model, tokens(2, 20), tokens(2, 4, seed=2))
    mx.eval(logits)
    return logits


def tensor_parallel(case: Case, bits: int | None, group: Group) -> None:
    config = wide(case.config)
    model = ours(config, bits=bits)
    alone, whole = logits_of(model), count(model)
    model.shard(group)
    together = logits_of(model)
    assert count(model) < whole
    assert_logits_close(together, alone, **sizes(config))


def pipelined(case: Case, bits: int | None, group: Group) -> None:
    model = ours(case.config, bits=bits)
    alone, whole = logits_of(model), count(model)
    model.model.pipeline(group)
    together = logits_of(model)
    assert len(model.layers) < sizes(case.config)["layers"]
    assert count(model) < whole
    assert_logits_close(together, alone, **sizes(case.config))


def count(model: nn.Module) -> int:
    return sum(value.size for value in parameters(model).values())


def trained(case: Case, group: Group) -> None:
    """Gradients of what every rank holds whole: embedding, norms, routers, gates, head."""
    config = wide(case.config)
    model = ours(config).train()
    alone = gradients(model)
    model.shard(group)
    together = gradients(model)
    shared = {path: g for path, g in together.items() if g.shape == alone[path].shape}
    whole = ("norm", "norm_1", "norm_2", "wte", "embed_tokens", "embeddings", "gate", "layer", "lm_head")
    assert all(p in shared for p in alone if p.removesuffix(".weight").endswith(whole))
    assert_gradients_close(shared, {path: alone[path] for path in shared}, **sizes(config))


def gradients(model: nn.Module) -> Weights:
    text = tokens(2, 17)

    def loss() -> mx.array:
        return nn.losses.cross_entropy(model(text[:, :-1]), text[:, 1:], reduction="mean")

    _, found = nn.value_and_grad(model, loss)()
    found = dict(tree_flatten(found))
    mx.eval(found)
    return found


def block(quantize: dict[str, object] | None = None) -> tuple[MoE, mx.array]:
    """An MoE block with everything a block can have, biases included, and an input."""
    rng = np.random.default_rng(0)
    spec = RouterSpec(num_experts=4, top_k=2, renormalize=True)
    moe = MoE(spec, 64, 128, shared_width=128, shared_gate=True, bias=True)
    moe.load_weights(
        [
            (path, mx.array((rng.standard_normal(value.shape) * value.shape[-1] ** -0.5).astype(np.float32)))
            for path, value in sorted(parameters(moe).items())
        ]
    )
    if quantize is not None:
        for stack in ("gate_proj", "up_proj", "down_proj"):
            layer = moe.switch_mlp[stack]
            moe.switch_mlp[stack] = layer.to_quantized(**quantize)
    return moe, mx.array(rng.standard_normal((2, 9, 64)).astype(np.float32))


def biased_block(quantize: dict[str, object] | None, group: Group) -> None:
    moe, x = block(quantize)
    alone = moe(x)
    mx.eval(alone)
    scales = [layer.get("global_scale") for layer in moe.switch_mlp.children().values()]
    moe.shard(group)
    together = moe(x)
    mx.eval(together)
    for layer, scale in zip(moe.switch_mlp.children().values(), scales, strict=True):
        assert scale is None or mx.array_equal(layer.global_scale, scale)
    assert_logits_close(together, alone, layers=1, hidden=128)


def block_gradients(group: Group) -> None:
    """A rank's gradients are its part of the whole ones; those of x and of what is replicated are whole."""
    moe, x = block()
    rank, ranks = group.rank(), group.size()

    def loss(weights: Weights, x: mx.array) -> mx.array:
        model = copy.copy(moe)
        model.load_weights(list(weights.items()))
        return (model(x) * mx.arange(64)).sum() / x.size

    def find(weights: Weights) -> Weights:
        by_path, by_x = mx.grad(loss, argnums=(0, 1))(weights, x)
        mx.eval(by_path, by_x)
        return {**by_path, "x": by_x}

    def part(path: str, whole: mx.array) -> mx.array:
        if "_proj" not in path or path.endswith("down_proj.bias"):
            return whole
        axis = -1 if path.endswith("bias") or "down_proj" in path else -2
        return mx.split(whole, ranks, axis=axis)[rank]

    alone = find(parameters(moe))
    moe.shard(group)
    together = find(parameters(moe))
    # The bias of the down projection is added once, so only one rank has (and trains) it.
    want = {
        path: part(path, g) for path, g in alone.items() if rank == 0 or not path.endswith("down_proj.bias")
    }
    assert_gradients_close(together, want, layers=1, hidden=128)


CHECKS: dict[str, Check] = {
    **{
        f"{name}-{case}-{bits}bit" if bits else f"{name}-{case}-unquantized": partial(check, case, bits)
        for name, check in (("tensor", tensor_parallel), ("pipeline", pipelined))
        for case in FULL
        for bits in (None, 4)
    },
    **{f"training-{case}": partial(trained, case) for case in FULL},
    "block-biases": partial(biased_block, None),
    "block-biases-4bit": partial(biased_block, {"group_size": 64, "bits": 4}),
    "block-nvfp4-global-scale": partial(
        biased_block, {"group_size": 16, "bits": 4, "mode": "nvfp4", "global_scale": True}
    ),
    "block-gradients": block_gradients,
}


def run(checks: dict[str, Check], results: Path) -> None:
    """Run the checks, a line each."""
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    with results.open("w") as out:
        for name, check in checks.items():
            try:
                check(group)
                failure = None
            except Exception:
                failure = traceback.format_exc()
            print(json.dumps({"check": name, "failure": failure}), file=out, flush=True)


if __name__ == "__main__":
    run(CHECKS, Path(sys.argv[1]))
