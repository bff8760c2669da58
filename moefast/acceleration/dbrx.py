"""DBRX, whose experts mlx-lm keeps in a Python list: stacked here, and unstacked again by restore.

Stacking moves one projection of one layer at a time and frees what it has copied, so memory grows by that
much for a moment and is then what it was.
"""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx
import mlx.nn

from ..families import Block
from ..nn.projection import projection_of
from .block import AcceleratedBlock, forward

KIND = "dbrx.SparseMoeBlock"
EXPERT = "dbrx.MLP"

# The names of an expert's projections and of the stacks.
_NAMES = {"w1": "gate_proj", "v1": "up_proj", "w2": "down_proj"}

ROW = Block(
    module="dbrx",
    name="SparseMoeBlock",
    letter="D",
    router="Router",
    logits="router.layer",
    # An L1 norm of positive scores is their sum.
    spec={"score_dtype": "float32", "weight_dtype": "x"},
    reads={"top_k": "num_experts_per_tok"},
    renormalize=True,
    code=("MLP.__call__",),
)


class AcceleratedDbrx(AcceleratedBlock):
    """Goes before DBRX's block, once :func:`stack` has stacked it. In training the reference runs: the
    original needs its list."""

    _moefast_row: ClassVar[Block] = ROW

    def __call__(self: Any, x: mx.array) -> mx.array:
        """x: ``[..., hidden]`` -> ``[..., hidden]``."""
        return forward(self, ROW, "reference" if self.training else self._moefast_backend, x)


def is_stacked(module: Any) -> bool:
    """Whether this is a block of DBRX after :func:`stack`."""
    return isinstance(module, AcceleratedDbrx)


def why_not_stack(block: Any) -> str | None:
    """Why the experts cannot be stacked, or None: they must be plain layers, all alike."""
    for mine in _NAMES:
        layers = [expert[mine] for expert in block.experts]
        first = layers[0]
        if any(projection_of(layer) is None for layer in layers):
            return f"its experts' {mine} are adapted: accelerate first, adapt later"
        forms = [{k: (v.shape, v.dtype) for k, v in layer.items() if v is not None} for layer in layers]
        if any(type(layer) is not type(first) for layer in layers) or any(f != forms[0] for f in forms):
            return f"its experts' {mine} are not alike"
        if any(_packing(layer) != _packing(first) for layer in layers):
            return f"its experts' {mine} are not quantized alike"
    return None


def stacked_form(block: Any) -> Any:
    """A block like ``block`` after :func:`stack`, whose stacks are never made: for what looks at shapes."""
    stacks = _bare_stacks()
    for mine, theirs in _NAMES.items():
        layer = block.experts[0][mine]
        made = _bare_stack(layer)
        for name, array in layer.items():
            made[name] = array
            if array is not None:
                made[name] = mx.broadcast_to(array, (len(block.experts), *array.shape))
        stacks[theirs] = made
    like = _bare(type(block))
    like.__dict__.update(block.__dict__)
    dict.update(like, {name: value for name, value in block.items() if name != "experts"})
    like.switch_mlp = stacks
    return like


def _packing(layer: Any) -> tuple[Any, ...]:
    return tuple(getattr(layer, name, None) for name in ("bits", "group_size", "mode"))


def stack(block: Any) -> None:
    """Make ``block.switch_mlp`` out of ``block.experts``, which is then empty; or, where that fails (memory),
    leave the block as it was."""
    stacks = _bare_stacks()
    moved: list[tuple[list[Any], str, mx.array]] = []
    for mine, theirs in _NAMES.items():
        layers = [expert[mine] for expert in block.experts]
        made = _bare_stack(layers[0])
        for name in list(layers[0]):
            if layers[0][name] is None:
                made[name] = None
                continue
            try:
                made[name] = mx.stack([layer[name] for layer in layers])
                mx.eval(made[name])
            except BaseException:
                for of_all, moved_name, whole in moved:
                    for i, layer in enumerate(of_all):
                        layer[moved_name] = whole[i]
                raise
            moved.append((layers, name, made[name]))
            for layer in layers:  # frees them
                layer[name] = mx.zeros(())
        _copy_flags(layers[0], made)
        stacks[theirs] = made
    _copy_flags(block, stacks)
    block.__dict__["_moefast_experts"] = len(block.experts), type(block.experts[0])
    block.experts = []
    block.switch_mlp = stacks


def why_not_unstack(block: Any) -> str | None:
    """Why :func:`unstack` is impossible, or None: an adapter of a stack has no place in a list."""
    for name in _NAMES.values():
        layer = block.switch_mlp[name]
        if projection_of(layer) is None:
            return f"{name} is a {type(layer).__name__}"
    return None


def unstack(block: Any) -> None:
    """Undo :func:`stack`: the very same values in the original's list."""
    count, kind = block.__dict__.pop("_moefast_experts")
    experts = [_bare(kind) for _ in range(count)]
    stacks = block.switch_mlp
    for mine, theirs in _NAMES.items():
        layer = stacks[theirs]
        is_quantized = hasattr(layer, "bits")
        parts = [_bare(mlx.nn.QuantizedLinear if is_quantized else mlx.nn.Linear) for _ in experts]
        for name in list(layer):
            whole = layer[name]
            for i, part in enumerate(parts):
                if whole is None:
                    part[name] = None
                else:
                    part[name] = mx.contiguous(whole[i])
            if whole is not None:
                mx.eval([part[name] for part in parts])
                layer[name] = mx.zeros(())
        for expert, part in zip(experts, parts, strict=True):
            if is_quantized:
                part.bits, part.group_size, part.mode = _packing(layer)
            _copy_flags(layer, part)
            expert[mine] = part
    for expert in experts:
        _copy_flags(stacks, expert)
    del block["switch_mlp"]
    block.experts = experts


def _bare_stacks() -> Any:
    from mlx_lm.models.switch_layers import SwiGLU, SwitchGLU

    stacks = _bare(SwitchGLU)
    stacks.activation = SwiGLU()
    return stacks


def _bare_stack(layer: Any) -> Any:
    """What stacks of layers like this one are, without arrays."""
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    if not isinstance(layer, mlx.nn.QuantizedLinear):
        return _bare(SwitchLinear)
    made = _bare(QuantizedSwitchLinear)
    made.bits, made.group_size, made.mode = _packing(layer)
    made.global_scale = None
    return made


def _bare(kind: Any) -> Any:
    """A module of a class without what its constructor would draw."""
    made = kind.__new__(kind)
    mlx.nn.Module.__init__(made)
    return made


def _copy_flags(source: Any, target: Any) -> None:
    """Training or evaluation, and which parameters are frozen."""
    target._training = source.training
    target._no_grad = set(source._no_grad)
