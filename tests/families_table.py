"""Writes docs/families.md: which MoE families of mlx-lm are accelerated, and how.

    python tests/families_table.py

The table is made of the rows of moefast.families and of the classes that the tiny models of mlx_lm_models.py
consist of; test_acceleration_families.py accelerates those models and compares.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.nn as nn
import mlx_lm
from mlx_lm_models import MODELS, Tiny, config_of

from moefast.acceleration import apart, dbrx
from moefast.families import BLOCKS, Block

PAGE = Path(__file__).parent.parent / "docs" / "families.md"

_HEAD = """\
# MoE families of mlx-lm

Written by `python tests/families_table.py` from mlx-lm {version}; a test checks that it is up to date.

`moefast.accelerate(model)` knows every class of MoE block in mlx-lm. What it does with each is below, and
`print(report)` says it of a model. Each row is tried with random models, unquantized, in 4 and in 8 bits,
on the reference and the native backend: logits of prompts, batches, chunks and cached steps agree with
mlx-lm's in float32 and greedy text is the same; in bfloat16 the accelerated model is the closer one to
float32 (`tests/test_acceleration_families.py`; the whole matrix with `-m slow`). Metal kernels run in the
emulator for {metal}.

- **Router**: A, softmax of the selected logits; B, softmax over all, renormalised by flag; C, not
  renormalised; D, other softmaxes; E, sigmoid with a selection bias and groups, those dropped filled with
  0; F, with -inf; G, sigmoid or the like without groups; H, none of these.
- **In one operation**: router, experts and their sum are one call, which a backend may fuse; the shared
  expert with them, where it says so. *An operation each*: router and experts are two.
- A shared expert that is *called* is the model's own module. On the native backend its layers are
  accelerated like all dense ones.
- A block that is in no row, of a model that is not mlx-lm's or of a later release, keeps its router and
  gets fast experts, if it has a plain `SwitchGLU` or `SwitchMLP`.

| family | router | block | router and experts | shared expert | remarks |
|---|---|---|---|---|---|
"""

_REMARKS = {
    "dbrx": "experts are a Python list: stacked by `accelerate`, unstacked by `restore`; names of parameters"
    " change meanwhile",
    "deepseek_v41": "unquantized bfloat16 does not run on a CPU: mlx-lm's attention multiplies stacks, too",
    "gemma4_text": "router and experts are two modules of the decoder layer",
    "kimi_k3": "shards run the original: ranks are summed before a norm",
    "llama4": "the router's weight multiplies the experts' input: the router is the original's",
    "longcat_flash": "experts beyond the stack return their input; shards run the original",
    "muse_spark": "needs an Apple GPU: router and combine are Metal kernels of mlx-lm's own, and stay; only"
    " its experts were tried",
    "nemotron_h": "layers before and behind the experts, where the configuration has them, are called",
    "phimoe": "sparsemixer: the router is the original's",
}


def lines() -> Iterator[str]:
    """A line of the table for each module of mlx-lm."""
    rows = {f"{row.module}.{row.name}": row for row in (*BLOCKS, dbrx.ROW)}
    done = set()
    for tiny in sorted(MODELS, key=lambda tiny: tiny.module.lower()):
        if tiny.module in done:
            continue
        done.add(tiny.module)
        kinds = {_kind(module) for _, module in _model(tiny).named_modules()}
        (found,) = [kind for kind in kinds if kind in rows or kind in _OTHERS]
        remark = _REMARKS.get(tiny.module, "")
        if found.partition(".")[0] != tiny.module and not remark:
            remark = _REMARKS.get(found.partition(".")[0], "")
        if found in rows:
            letter, how, shared = rows[found].letter, *_how(rows[found])
        else:
            letter, how, shared = _OTHERS[found]
        yield f"| {tiny.module} | {letter} | `{found}` | {how} | {shared} | {remark} |"


# Blocks that no row describes.
_OTHERS = {
    apart.ROUTER: ("A", "an operation each", "no"),
    "llama4.MoE": ("H", "experts only", "called"),
    "muse_spark.MoE": ("H", "experts only", "no"),
    "phimoe.PhiMoESparseMoeBlock": ("H", "experts only", "no"),
}


def _how(row: Block) -> tuple[str, str]:
    if row.mix is not None or row.sum_float32 or (row.shared is not None and row.shared_class is None):
        return "an operation each", "called"
    if row.shared is None:
        return "in one operation", "no"
    return "in one operation", "with them" + (", its sigmoid gate too" if row.shared_gate is not None else "")


def _model(tiny: Tiny) -> nn.Module:
    module = importlib.import_module(f"mlx_lm.models.{tiny.module}")
    model: nn.Module = module.Model(module.ModelArgs.from_dict(config_of(tiny)))
    return model


def _kind(module: nn.Module) -> str:
    return f"{type(module).__module__.removeprefix('mlx_lm.models.')}.{type(module).__qualname__}"


def page(metal: tuple[str, ...]) -> str:
    """The whole page; ``metal``: the families of the emulator's tests."""
    names = ", ".join(metal[:-1]) + f" and {metal[-1]}"
    return _HEAD.format(version=mlx_lm.__version__, metal=names) + "\n".join(lines()) + "\n"


if __name__ == "__main__":
    from test_acceleration_families import METAL

    PAGE.write_text(page(METAL), encoding="utf-8")
    print(PAGE, file=sys.stderr)
