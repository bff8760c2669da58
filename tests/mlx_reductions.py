"""MLX's kernels that combine many elements: reductions, scans, sorts."""

from __future__ import annotations

from typing import Any

import numpy as np
from mlx_kernels import ROUNDOFF, Run, i32, i64, normal, numbers, of, out, scalar

from moefast import emulator

REDUCE = ("atomic.h", "reduction/ops.h", "reduce.h")
OPERATIONS = {"Sum": np.sum, "Prod": np.prod, "Max": np.max, "Min": np.min}


def _reduction(kind: str, operation: str, rows: int, columns: int) -> np.ndarray:
    values = normal(rows, columns)
    # Products of many numbers near 1, or they vanish.
    return of(kind, 1 + values / (8 * rows * columns) ** 0.5 if operation == "Prod" else values)


def _reduce_error(kind: str, count: int) -> float:
    return 4 * (1 + count / 8) * ROUNDOFF[kind]  # partial results are of the array's type


def row_reduce(kind: str, operation: str, rows: int, size: int) -> Run:
    x = _reduction(kind, operation, rows, size)
    threads = 32 if size <= 512 else (size + 127) // 128 * 32 if size <= 4096 else 1024
    return Run(
        REDUCE,
        f'instantiate_kernel("k", row_reduce_simple, {kind}, {kind}, {operation}<{kind}>, size_t)',
        {
            "in": x,
            "out": out(kind, rows),
            "reduction_size": scalar(size, np.uint64),
            "out_size": scalar(rows, np.int64),
        },
        (threads, (rows + 3) // 4, 1),
        (threads, 1, 1),
        "out",
        kind,
        OPERATIONS[operation](numbers(x, kind), -1),
        _reduce_error(kind, size),
        equal_writes=rows % 4 != 0,  # a threadgroup computes 4 rows, the last one rows of the one before
    )


def _strided(count: int, stride: int) -> dict[str, Any]:
    """Arguments of a column reduction without further dimensions."""
    return {
        "reduction_size": scalar(count, np.uint64),
        "reduction_stride": scalar(stride, np.int64),
        "shape": i32(1),
        "strides": i64(0),
        "ndim": scalar(0),
        "reduce_shape": i32(count),
        "reduce_strides": i64(stride),
        "reduce_ndim": scalar(1),
        "non_col_reductions": scalar(1, np.uint64),
        "column_offset": scalar(0, np.uint64),
    }


def col_reduce_small(kind: str, operation: str, rows: int, columns: int) -> Run:
    x = _reduction(kind, operation, rows, columns)
    blocks = (columns + 3) // 4
    tx, ty = min(blocks, 32), min(8, rows)
    return Run(
        REDUCE,
        f'instantiate_kernel("k", col_reduce_small, {kind}, {kind}, {operation}<{kind}>, int, 1)',
        {"in": x, "out": out(kind, columns), **_strided(rows, columns)},
        ((blocks + tx - 1) // tx * tx, ty, 1),
        (tx, ty, 1),
        "out",
        kind,
        OPERATIONS[operation](numbers(x, kind), 0),
        _reduce_error(kind, rows),
    )


def col_reduce_looped(kind: str, operation: str, rows: int, columns: int) -> Run:
    x = _reduction(kind, operation, rows, columns)
    bn = 32
    threads = 4 * 32 * 2
    return Run(
        REDUCE,
        f'instantiate_kernel("k", col_reduce_looped, {kind}, {kind}, {operation}<{kind}>, int, 1, 32, 32)',
        {"in": x, "out": out(kind, columns), **_strided(rows, columns)},
        (threads * ((columns + bn - 1) // bn), 1, 1),
        (threads, 1, 1),
        "out",
        kind,
        OPERATIONS[operation](numbers(x, kind), 0),
        _reduce_error(kind, rows),
    )


def all_reduce(kind: str, operation: str, size: int) -> Run:
    x = _reduction(kind, operation, 1, size)
    threads = (size + 127) // 128 * 32
    return Run(
        REDUCE,
        f'instantiate_kernel("k", all_reduce, {kind}, {kind}, {operation}<{kind}>, int64_t)',
        {
            "in": x,
            "out": out(kind, 1),
            "in_size": scalar(size, np.uint64),
            "row_size": scalar(size, np.uint64),
        },
        (threads, 1, 1),
        (threads, 1, 1),
        "out",
        kind,
        OPERATIONS[operation](numbers(x, kind)).reshape(1),
        _reduce_error(kind, size),
    )


SCANS = {
    "Sum": (np.cumsum, 0.0),
    "Prod": (np.cumprod, 1.0),
    "Max": (np.maximum.accumulate, -np.inf),
    "Min": (np.minimum.accumulate, np.inf),
    "Logaddexp": (np.logaddexp.accumulate, -np.inf),
}


def _scanned(values: np.ndarray, axis: int, inclusive: bool, reverse: bool, operation: str) -> np.ndarray:
    accumulate, first = SCANS[operation]
    values = np.flip(values, axis) if reverse else values
    if not inclusive:
        start = np.full_like(np.take(values, [0], axis), first)
        values = np.concatenate([start, np.delete(values, -1, axis)], axis)
    done = accumulate(values, axis)
    return np.flip(done, axis) if reverse else done


def _scan(kind: str, which: str, inclusive: bool, reverse: bool, operation: str) -> str:
    words = f"{str(inclusive).lower()}, {str(reverse).lower()}"
    return f'instantiate_kernel("k", {which}_scan, {kind}, {kind}, Cum{operation}<{kind}>, 4, {words})'


def scan(kind: str, rows: int, size: int, inclusive: bool, reverse: bool, operation: str = "Sum") -> Run:
    """Along rows."""
    x = _reduction(kind, operation, rows, size)
    threads = (size + 127) // 128 * 32
    return Run(
        ("binary_ops.h", "scan.h"),
        _scan(kind, "contiguous", inclusive, reverse, operation),
        {"in": x, "out": out(kind, rows, size), "axis_size": scalar(size, np.uint64)},
        (threads, rows, 1),
        (threads, 1, 1),
        "out",
        kind,
        _scanned(numbers(x, kind), 1, inclusive, reverse, operation),
        _reduce_error(kind, size),
    )


def strided_scan(
    kind: str, size: int, stride: int, inclusive: bool, reverse: bool, operation: str = "Sum"
) -> Run:
    """Along columns."""
    x = _reduction(kind, operation, size, stride)
    blocks = (stride + 31) // 32
    return Run(
        ("binary_ops.h", "scan.h"),
        _scan(kind, "strided", inclusive, reverse, operation),
        {
            "in": x,
            "out": out(kind, size, stride),
            "axis_size": scalar(size, np.uint64),
            "stride": scalar(stride, np.uint64),
            "stride_blocks": scalar(blocks, np.uint64),
        },
        (256, blocks, 1),
        (256, 1, 1),
        "out",
        kind,
        _scanned(numbers(x, kind), 0, inclusive, reverse, operation),
        _reduce_error(kind, size),
    )


def sort(kind: str, rows: int, size: int, arg: bool) -> Run:
    """Few different values, so that the order of equal ones shows: the sort is stable."""
    bn, tn = 32 if size <= 128 else 64 if size <= 256 else 128, 4
    x = of(kind, np.round(normal(rows, size) * 3))
    order = np.argsort(numbers(x, kind), -1, kind="stable")
    result = "uint32_t" if arg else kind
    return Run(
        ("sort.h",),
        f'instantiate_kernel("k", block_sort, {kind}, {result}, {str(arg).lower()}, {bn}, {tn})',
        {
            "inp": x,
            "out": out_of_indices(rows, size) if arg else out(kind, rows, size),
            "size_sorted_axis": scalar(size),
            "in_stride_sorted_axis": scalar(1),
            "out_stride_sorted_axis": scalar(1),
            "in_stride_segment_axis": scalar(size),
            "out_stride_segment_axis": scalar(size),
        },
        (bn, rows, 1),
        (bn, 1, 1),
        "out",
        "float" if arg else kind,
        order.astype(np.float64) if arg else np.sort(numbers(x, kind), -1),
        0.0,
    )


def out_of_indices(*shape: int) -> Any:
    return emulator.Output(shape, np.uint32)
