"""Reference matrix products: dense and gathered, every weight format, accurate on any device.

On a GPU these are MLX's own operations. MLX's CPU lacks three things, supplied here:

- ``gather_mm`` takes float32 only: half-precision stacks go through :func:`_blocked`.
- quantized products accumulate in the dtype of x (5-9 % error in bfloat16): x is upcast to float32 and
  the result rounded once.
- nvfp4's ``global_scale`` is refused: the product is scaled afterwards, which is the same thing.

And a quantized product without rows, which ends the process with a division by zero, is not started.
"""

from __future__ import annotations

import mlx.core as mx

from ...registry import device_name
from ...weights import Projection

# What MLX divides a global scale by: the largest e4m3 value times the largest e2m1 value.
_NVFP4_RANGE = 448.0 * 6.0

# Bytes of expert weights that _blocked copies (and upcasts) at a time, or one expert where that is larger.
# MLX issues about ten operations ahead of the one that runs: several such chunks are alive at once.
_CHUNK_BYTES = 8 << 20


def dense(x: mx.array, projection: Projection) -> mx.array:
    """``x @ w.T + bias``. x: ``[..., in]`` -> ``[..., out]``."""
    p = projection
    if p.quant is None or p.scales is None:
        return x @ p.weight.T if p.bias is None else mx.addmm(p.bias, x, p.weight.T)
    if x.size:
        y = mx.quantized_matmul(
            x.astype(mx.float32) if device_name() == "cpu" else x,
            p.weight,
            p.scales,
            p.biases,
            transpose=True,
            **p.quant.mlx_arguments(),
        )
    else:  # MLX's CPU kernel divides by the number of rows: the process would die
        y = mx.zeros((*x.shape[:-1], p.layout.out_dims))
    if p.global_scale is not None:
        y = y * (p.global_scale / _NVFP4_RANGE)
    y = y.astype(output_dtype(x, p))
    return y if p.bias is None else y + p.bias


def several(x: mx.array, *weights: Projection) -> list[mx.array]:
    """:func:`dense` with each of the weights."""
    return [dense(x, weight) for weight in weights]


def gathered(x: mx.array, projection: Projection, indices: mx.array, *, in_order: bool) -> mx.array:
    """Each route's row times its expert's weight.

    Args:
        x: ``[..., 1, in]``, batch dimensions broadcast against ``indices``.
        projection: a stack.
        indices: ``[...]`` expert of each route.
        in_order: ``indices`` is sorted, so that MLX may reuse an expert's weights.

    Returns:
        ``[..., 1, out]``.
    """
    p = projection
    on_cpu = device_name() == "cpu"
    if p.quant is None or p.scales is None:
        if on_cpu and p.weight.dtype != mx.float32:
            y = _blocked(x, p.weight, indices)
        else:
            y = mx.gather_mm(x, p.weight.swapaxes(-1, -2), rhs_indices=indices, sorted_indices=in_order)
    elif on_cpu:
        y = _gathered_quantized_cpu(x, p, indices)
    else:
        y = mx.gather_qmm(
            x,
            p.weight,
            p.scales,
            p.biases,
            rhs_indices=indices,
            transpose=True,
            global_scale=p.global_scale,
            sorted_indices=in_order,
            **p.quant.mlx_arguments(),
        )
    return y if p.bias is None else y + mx.expand_dims(p.bias[indices], -2)


def output_dtype(x: mx.array, projection: Projection) -> mx.Dtype:
    """The dtype MLX gives the product."""
    dtype = projection.layout.dtype
    return x.dtype if dtype == mx.uint8 else mx.result_type(x, mx.zeros((), dtype))


def _gathered_quantized_cpu(x: mx.array, p: Projection, indices: mx.array) -> mx.array:
    assert p.quant is not None
    assert p.scales is not None
    weight, scales, biases, chosen = p.weight, p.scales, p.biases, indices
    # MLX casts the scales of the whole stack to x's dtype in every call. With few routes it takes less memory
    # to copy the experts in use out of the stack, packed, and cast theirs.
    cast = scales.size * mx.float32.size * (1 if biases is None else 2) // p.layout.num_experts
    copied = weight.nbytes // p.layout.num_experts + cast
    if p.layout.dtype in (mx.float16, mx.bfloat16) and indices.size * copied < p.layout.num_experts * cast:
        flat = indices.flatten()
        weight, scales = weight[flat], scales[flat]
        biases = None if biases is None else biases[flat]
        chosen = mx.arange(indices.size, dtype=mx.uint32).reshape(indices.shape)
    y = mx.gather_qmm(
        x.astype(mx.float32),
        weight,
        scales,
        biases,
        rhs_indices=chosen,
        transpose=True,
        **p.quant.mlx_arguments(),
    )
    if p.global_scale is not None:
        y = y * (p.global_scale[indices] / _NVFP4_RANGE)[..., None, None]
    return y.astype(output_dtype(x, p))


def _blocked(x: mx.array, weight: mx.array, indices: mx.array) -> mx.array:
    """``gather_mm`` for half-precision stacks on a CPU, out of dense products of blocks.

    Routes are sorted by expert and each expert's run is padded to whole blocks, so that a block has one
    expert and its weights are fetched once for all its rows. The plan is made of array operations only:
    no value is read, so this traces under ``mx.compile``. Weights are copied (and upcast, where x is
    float32) a chunk of blocks at a time: a DBRX layer would be 12.7 GB in float32.
    """
    experts, out_dims, in_dims = weight.shape
    dtype = mx.result_type(x, weight)
    rows = mx.broadcast_to(x, (*indices.shape, 1, in_dims)).reshape(-1, in_dims).astype(dtype)
    routes = rows.shape[0]
    if routes == 0:
        return mx.zeros((*indices.shape, 1, out_dims), dtype)
    block = min(64, max(1, routes // experts))
    num_blocks = routes // block + min(experts, routes) if block > 1 else routes
    flat = indices.flatten().astype(mx.int32)

    if block == 1:
        expert_of_block, slot_of_route = flat, mx.arange(routes)
        padded = rows
    else:
        order = mx.argsort(flat).astype(mx.int32)
        count = mx.zeros((experts,), mx.int32).at[flat].add(1)
        start = mx.cumsum(count) - count
        blocks = (count + block - 1) // block
        last_block = mx.cumsum(blocks)
        rank = mx.arange(routes) - start[flat[order]]
        slot = (last_block - blocks)[flat[order]] * block + rank
        slot_of_route = mx.put_along_axis(mx.zeros((routes,), mx.int32), order, slot, axis=0)
        expert_of_block = (last_block[None, :] <= mx.arange(num_blocks)[:, None]).sum(axis=-1)
        expert_of_block = mx.minimum(expert_of_block, experts - 1)
        # Slots that no route fills read the row of zeros appended at the end.
        source = mx.full((num_blocks * block,), routes, mx.int32)
        source = mx.put_along_axis(source, slot, order, axis=0)
        padded = mx.concatenate([rows, mx.zeros((1, in_dims), dtype)])[source]

    padded = padded.reshape(num_blocks, block, in_dims)
    element = weight.dtype.size + (0 if weight.dtype == dtype else dtype.size)
    step = max(1, _CHUNK_BYTES // (out_dims * in_dims * element))
    products: list[mx.array] = []
    for b in range(0, num_blocks, step):
        chosen = expert_of_block[b : b + step]
        if products:  # one chunk after another: unordered, MLX would copy them all before multiplying any
            (chosen,) = mx.depends([chosen], [products[-1]])
        stack = weight[chosen].astype(dtype).swapaxes(-1, -2)
        products.append(padded[b : b + step] @ stack)
    y = mx.concatenate(products).reshape(-1, out_dims)
    return y[slot_of_route].reshape(*indices.shape, 1, out_dims)
