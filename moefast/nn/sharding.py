"""Tensor parallelism of gated feed-forward networks, dense or stacked: each rank keeps part of the width.

``gate_proj`` and ``up_proj`` are split by output, ``down_proj`` by input, so that a rank's share of the width
is computed where it is used and one sum over the ranks completes the output (Shoeybi et al., "Megatron-LM",
arXiv:1909.08053).
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn
from mlx.nn.layers.distributed import shard_inplace

from ..errors import refuse
from .projection import projection_of


def check_split(
    block: mlx.nn.Module, inputs: Sequence[str], output: str, group: mx.distributed.Group
) -> None:
    """Refuse a split that would cut a quantization group, or leave one rank more than another.

    Args:
        block: holds the layers.
        inputs: names of the layers split by output.
        output: name of the layer split by input.
        group: the ranks.

    Raises:
        ValueError: naming the layer, its size and the number of ranks; or a layer is adapted (LoRA).
    """
    ranks = group.size()
    for name in (*inputs, output):
        if projection_of(block[name]) is None:
            refuse(
                "shard", f"{name} must be a plain layer: shard first, adapt later", type(block[name]).__name__
            )
    projection = projection_of(block[output])
    assert projection is not None
    width, quant = projection.layout.in_dims, projection.quant
    if width % ranks:
        refuse("shard", f"{output}'s input size {width} must divide among the ranks", ranks)
    if quant is not None and (width // ranks) % quant.group_size:
        refuse(
            "shard",
            f"{output}'s input size {width} must give each of {ranks} ranks whole quantization groups of "
            f"{quant.group_size}",
            f"{width // ranks} per rank",
        )


def split_width(block: mlx.nn.Module, group: mx.distributed.Group) -> None:
    """Keep this rank's share of the inner width of ``gate_proj``, ``up_proj`` and ``down_proj``.

    A bias of the down projection stays on rank 0 only: the outputs are summed.
    """
    for name in ("gate_proj", "up_proj"):
        shard_inplace(block[name], _by_output, group=group)
    down = block["down_proj"]
    shard_inplace(down, _by_input, group=group)
    if "bias" in down and group.rank() != 0:
        # Gone, not zero: a zero would be trained like rank 0's, and the sum get the step twice.
        down.pop("bias")


def _by_output(path: str, array: mx.array) -> int | None:
    if path.endswith("global_scale"):  # [num_experts], one number for all of an expert's rows
        return None
    return -1 if path.endswith("bias") else max(array.ndim - 2, 0)


def _by_input(path: str, array: mx.array) -> int | None:
    return None if path.endswith(("bias", "global_scale")) else -1
