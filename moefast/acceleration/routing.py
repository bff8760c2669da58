"""What a block of mlx-lm says of its routing, read by its row of :mod:`moefast.families` at each call:
whoever changes ``block.top_k`` of a loaded model changes it here, too."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, lru_cache
from operator import attrgetter
from typing import Any

import mlx.core as mx

from ..errors import refuse
from ..families import Block, Either
from ..specs import RouterSpec

_GROUPS = ("num_groups", "top_groups")


def router_spec(row: Block, block: Any, num_experts: int, dtype: str) -> RouterSpec:
    """The routing of ``block`` on inputs of ``dtype``.

    Args:
        row: what is known of the block's class.
        block: of that class.
        num_experts: length of its stacks.
        dtype: of its input, as a string.

    Raises:
        ValueError: an attribute says what its family does not know.
        AttributeError: it has no such attribute.
    """
    return _spec(row, said_by(row, block), num_experts, dtype)


def said_by(row: Block, block: Any) -> tuple[Any, ...]:
    """What the attributes that the row names say: all that :func:`router_spec` reads of the block.

    Raises:
        AttributeError: it has no such attribute.
    """
    said: tuple[Any, ...] = _reader(row)(block)
    return said


@cache
def _reader(row: Block) -> Callable[[Any], Any]:
    paths = [say.path if isinstance(say, Either) else say for say in row.reads.values()]
    if row.identity_attribute is not None:
        paths.append(row.identity_attribute)
    if row.groups_where is not None:
        paths.append(row.groups_where[0])
    read = attrgetter(*paths)
    return read if len(paths) > 1 else lambda block: (read(block),)


@lru_cache(maxsize=1024)
def _spec(row: Block, values: tuple[Any, ...], num_experts: int, dtype: str) -> RouterSpec:
    said = iter(values)
    fields: dict[str, Any] = dict(row.spec)
    for name, say in row.reads.items():
        value = next(said)
        fields[name] = _word(row, name, say, value) if isinstance(say, Either) else value
    if row.identity_attribute is not None:
        fields["identity_experts"] = int(next(said))
        num_experts += fields["identity_experts"]
    grouped = row.groups_where is None or next(said) == row.groups_where[1]
    # mlx-lm looks for groups where there are several, whatever the number of those that stay.
    if not grouped or (fields.get("num_groups") or 1) <= 1:
        fields = {name: value for name, value in fields.items() if name not in _GROUPS}
    flag = bool(fields.pop("renormalize", False))
    fields["renormalize"] = flag if isinstance(row.renormalize, str) else row.renormalize
    if row.renormalize == "flag_above_one" and fields["top_k"] == 1:
        fields["renormalize"] = False
    if fields.get("weight_dtype") == "x":
        fields["weight_dtype"] = dtype
    return RouterSpec(num_experts=num_experts, **{k: v for k, v in fields.items() if v is not None})


def _word(row: Block, field: str, say: Either, value: Any) -> str:
    word = say.words.get(value, say.otherwise)
    if word is None:
        refuse(f"{row.module}.{row.name}", f"{say.path} must be one of {tuple(say.words)}", repr(value))
    return word


def router_logits(row: Block, block: Any, x: mx.array) -> mx.array:
    """``[..., hidden]`` -> ``[..., num_experts]``, as the block computes them."""
    part = _part(row.logits)(block)
    if isinstance(part, mx.array):
        if row.float32_input == "both":
            x, part = x.astype(mx.float32), part.astype(mx.float32)
        return x @ part.T
    logits: mx.array = part(x.astype(mx.float32) if row.float32_input == "x" else x)
    return logits


@cache
def _part(path: str) -> Callable[[Any], Any]:
    return attrgetter(path)


def selection_bias(row: Block, block: Any) -> mx.array | None:
    """``[num_experts]``, or None where the configuration has none.

    Raises:
        AttributeError: there is no such attribute.
    """
    if row.bias is None or (row.bias_where is not None and not _part(row.bias_where)(block)):
        return None
    bias: mx.array | None = _part(row.bias)(block)
    return bias


def part(block: Any, path: str) -> Any:
    """The part of a block at a dotted path, None where there is none."""
    try:
        return _part(path)(block)
    except AttributeError:
        return None
