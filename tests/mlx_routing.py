"""A router as mlx-lm's formulas run on a GPU: every operation by MLX's own Metal kernel, emulated.

What moves numbers without computing (slices, gathers, masks) is NumPy. The kernels, their shapes and launches
are those that MLX's eval_gpu functions choose for rows of up to 2048.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_kernels import ROOT, TYPES, bits, i32, i64, out, scalar

from moefast import RouterSpec, emulator

KIND = {dtype: kind for kind, dtype in TYPES.items()}
REDUCE = ("atomic.h", "reduction/ops.h", "reduce.h")
Routed = tuple[np.ndarray, mx.array]


def route(
    logits: mx.array, spec: RouterSpec, bias: mx.array | None = None, scale: mx.array | None = None
) -> Routed:
    """Indices and weights of logits ``[tokens, num_experts]``: the reference's formulas, kernel by kernel."""
    if spec.score_over == "selected":
        source = _transform(logits, spec)
    else:
        source = _score(_transform(cast(logits, spec.score_dtype), spec), spec)
    key = _biased(source, bias, spec)
    if spec.drops_groups:
        key = _mask(key, spec)
    if spec.weights_from == "masked":
        source = key
    if spec.ties == "lowest":
        indices = argsort(unary("Negative", key))[:, : spec.top_k]
    else:
        indices = argsort(key)[:, -spec.top_k :]
    return indices, _weigh(source, indices, logits.dtype, spec, scale)


def _transform(x: mx.array, spec: RouterSpec) -> mx.array:
    if spec.softcap > 0:
        x = binary("Multiply", unary("Tanh", binary("Divide", x, spec.softcap)), spec.softcap)
    return x if spec.temperature == 1.0 else binary("Divide", x, spec.temperature)


def _score(x: mx.array, spec: RouterSpec) -> mx.array:
    if spec.score == "sigmoid":
        return unary("Sigmoid", x)
    if spec.score == "sqrtsoftplus":
        return unary("Sqrt", binary("LogAddExp", x, 0))
    return softmax(x, spec.precise)


def _biased(source: mx.array, bias: mx.array | None, spec: RouterSpec) -> mx.array:
    if bias is None:
        return source
    if spec.bias_dtype == "scores":
        return binary("Add", source, cast(bias, source.dtype))
    return promoting("Add", cast(source, spec.bias_dtype), bias)


def _mask(key: mx.array, spec: RouterSpec) -> mx.array:
    tokens = key.shape[0]
    size = spec.num_experts // spec.num_groups
    grouped = key.reshape(tokens * spec.num_groups, size)
    if spec.group_score == "top2_sum":
        two = grouped if size == 2 else sort(grouped)[:, -2:]
        scores = reduce("Sum", mx.contiguous(two))
    else:
        scores = reduce("Max", grouped)
    drop = spec.num_groups - spec.top_groups
    dropped = argsort(scores.reshape(tokens, spec.num_groups))[:, :drop]
    lost = np.zeros((tokens, spec.num_groups), bool)
    np.put_along_axis(lost, dropped.astype(np.int64), True, axis=-1)
    fill = mx.array(0.0 if spec.dropped_fill == "zero" else -np.inf, key.dtype)
    return mx.where(mx.array(np.repeat(lost, size, axis=-1)), fill, key)


def _weigh(
    source: mx.array, indices: np.ndarray, logits: mx.Dtype, spec: RouterSpec, scale: mx.array | None
) -> mx.array:
    weights = mx.take_along_axis(source, mx.array(indices), axis=-1)
    if spec.score_over == "selected":
        weights = _score(cast(weights, spec.score_dtype), spec)
    if spec.renormalize:
        total = reduce("Sum", weights)
        if spec.renormalize_eps:
            total = binary({"add": "Add", "max": "Maximum"}[spec.eps_form], total, spec.renormalize_eps)
        weights = binary("Divide", weights, total[:, None])
    if scale is not None:
        weights = promoting("Multiply", weights, scale[mx.array(indices)])
    if spec.scale != 1.0 and spec.scale_place == "weights":
        weights = binary("Multiply", weights, spec.scale)
    return cast(weights, logits if spec.weight_dtype == "logits" else spec.weight_dtype)


# -- one operation each ------------------------------------------------------------------------------------


def unary(name: str, x: mx.array) -> mx.array:
    kind = KIND[x.dtype]
    kernel = _kernel(("unary_ops.h", "unary.h"), f"unary_v, {kind}, {kind}, {name}")
    buffers = {"in": bits(x), "out": out(kind, *x.shape), "size": scalar(x.size, np.uint32)}
    return _elementwise(kernel, buffers, "out", x)


def binary(name: str, x: mx.array, y: mx.array | float) -> mx.array:
    """Of equal dtypes, or with a number, which takes the array's as MLX converts it."""
    other = mx.broadcast_to(y if isinstance(y, mx.array) else _number(y, x.dtype), x.shape)
    assert other.dtype == x.dtype
    kind = KIND[x.dtype]
    kernel = _kernel(("binary_ops.h", "binary.h"), f"binary_vv, {kind}, {kind}, {name}")
    buffers = {
        "a": bits(x),
        "b": bits(mx.contiguous(other)),
        "c": out(kind, *x.shape),
        "size": scalar(x.size, np.uint32),
    }
    return _elementwise(kernel, buffers, "c", x)


def promoting(name: str, x: mx.array, y: mx.array) -> mx.array:
    dtype = x.dtype if x.dtype == y.dtype else mx.float32
    return binary(name, cast(x, dtype), cast(y, dtype))


def cast(x: mx.array, dtype: str | mx.Dtype | None) -> mx.array:
    to = getattr(mx, dtype) if isinstance(dtype, str) else dtype
    if to is None or to == x.dtype:
        return x
    kind = KIND[to]
    kernel = _kernel(("copy.h",), f"copy_v, {KIND[x.dtype]}, {kind}")
    buffers = {"src": bits(x), "dst": out(kind, *x.shape), "size": scalar(x.size, np.uint32)}
    return _elementwise(kernel, buffers, "dst", mx.zeros(x.shape, to))


def softmax(x: mx.array, precise: bool) -> mx.array:
    rows, size = x.shape
    kind = KIND[x.dtype]
    accumulator = "float" if precise else kind
    threads = (size + 127) // 128 * 32
    kernel = _kernel(("softmax.h",), f"softmax_single_row, {kind}, {accumulator}")
    buffers = {"in": bits(x), "out": out(kind, rows, size), "axis_size": scalar(size)}
    return _launch(kernel, buffers, (rows * threads, 1, 1), (threads, 1, 1), "out", x.dtype)


def reduce(operation: str, x: mx.array) -> mx.array:
    """Of rows: of up to 64 one thread has one (in longer ones only maxima are taken, in any order)."""
    rows, size = x.shape
    if size == 1:
        return x.reshape(rows)
    kind = KIND[x.dtype]
    kernel = _kernel(REDUCE, f"row_reduce_small, {kind}, {kind}, {operation}<{kind}>, int, 1")
    buffers = {
        "in": bits(x),
        "out": out(kind, rows),
        "row_size": scalar(size, np.int64),
        "non_row_reductions": scalar(1, np.int64),
        "shape": i32(rows),
        "strides": i64(size),
        "ndim": scalar(1),
        "reduce_shape": i32(0),
        "reduce_strides": i64(0),
        "reduce_ndim": scalar(0),
    }
    return _launch(kernel, buffers, (rows, 1, 1), (min(rows, 1024), 1, 1), "out", x.dtype)


def argsort(x: mx.array) -> np.ndarray:
    return np.array(_sort(x, "uint32_t"))


def sort(x: mx.array) -> mx.array:
    return _sort(x, KIND[x.dtype])


def _sort(x: mx.array, result: str) -> mx.array:
    rows, size = x.shape
    threads = next(bn for bn in (32, 64, 128, 256, 512) if size <= 4 * bn)
    indices = result == "uint32_t"
    arguments = f"block_sort, {KIND[x.dtype]}, {result}, {str(indices).lower()}, {threads}, 4"
    buffers = {
        "inp": bits(x),
        "out": emulator.Output((rows, size), np.uint32) if indices else out(result, rows, size),
        "size_sorted_axis": scalar(size),
        "in_stride_sorted_axis": scalar(1),
        "out_stride_sorted_axis": scalar(1),
        "in_stride_segment_axis": scalar(size),
        "out_stride_segment_axis": scalar(size),
    }
    dtype = mx.uint32 if indices else x.dtype
    return _launch(
        _kernel(("sort.h",), arguments), buffers, (threads, rows, 1), (threads, 1, 1), "out", dtype
    )


def _number(value: float, dtype: mx.Dtype) -> mx.array:
    return mx.maximum(mx.full((1,), -np.inf, dtype), value)


@cache
def _kernel(headers: tuple[str, ...], arguments: str) -> emulator.Kernel:
    includes = "".join(f'#include "{ROOT}{header}"\n' for header in ("utils.h", *headers))
    source = f'{includes}instantiate_kernel("k", {arguments})'
    return emulator.compile(source, "k", include_dirs=[emulator.mlx_include_dir()], name="mlx.metal")


def _elementwise(kernel: emulator.Kernel, buffers: dict[str, Any], result: str, like: mx.array) -> mx.array:
    """Threads have some elements each; those without any do nothing that counts."""
    size = like.size
    return _launch(kernel, buffers, (size, 1, 1), (min(size, 1024), 1, 1), result, like.dtype)


def _launch(
    kernel: emulator.Kernel,
    buffers: dict[str, Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    result: str,
    dtype: mx.Dtype,
) -> mx.array:
    bound = {index: buffers[parameter.name] for index, parameter in kernel.signature.buffers.items()}
    (at,) = (index for index, parameter in kernel.signature.buffers.items() if parameter.name == result)
    made = mx.array(emulator.launch(kernel, bound, grid, threadgroup).buffers[at])
    return made.view(mx.bfloat16) if dtype == mx.bfloat16 else made
