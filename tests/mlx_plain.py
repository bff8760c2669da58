"""MLX's kernels without quantization: products, softmax, element-wise operations, gather, attention."""

from __future__ import annotations

import numpy as np
from mlx_kernels import ROUNDOFF, Run, dot_error, i32, i64, normal, numbers, of, out, scalar

STEEL = "steel/gemm/gemm.h"


def _gemm_params(M: int, N: int, K: int, bm: int, bn: int, bk: int) -> np.ndarray:
    """steel::GEMMParams of C = A B^T."""
    parts = [
        i32(M, N, K, K, K, N, (N + bn - 1) // bn, (M + bm - 1) // bm),
        i64(0, 0, 0),
        i32(0, K // bk, 1),
    ]
    raw = b"".join(part.tobytes() for part in parts)
    return np.frombuffer(raw + bytes(-len(raw) % 8), np.uint8).copy()


def steel_gemm(kind: str, M: int, N: int, K: int) -> Run:
    bm, bn, bk = 32, 32, 16
    a, b = of(kind, normal(M, K)), of(kind, normal(N, K, seed=1))
    return Run(
        (STEEL, "steel/gemm/kernels/steel_gemm_fused.h"),
        f'instantiate_kernel("k", gemm, {kind}, {bm}, {bn}, {bk}, 2, 2, false, true, float)',
        {"A": a, "B": b, "D": out(kind, M, N), "params": _gemm_params(M, N, K, bm, bn, bk)},
        ((N + bn - 1) // bn * 32, (M + bm - 1) // bm * 2, 2),
        (32, 2, 2),
        "D",
        kind,
        numbers(a, kind) @ numbers(b, kind).T,
        dot_error(kind, K),
        {10: False, 100: False, 110: False, 200: M % bm == 0, 201: N % bn == 0, 202: K % bk == 0, 300: False},
    )


def gather_mm_rhs(kind: str, counts: tuple[int, ...], N: int, K: int) -> Run:
    """Rows sorted by expert."""
    bm, bn, bk = 16, 64, 16
    M, E = sum(counts), len(counts)
    a, b = of(kind, normal(M, K)), of(kind, normal(E, N, K, seed=1))
    expert = np.repeat(np.arange(E), counts)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
    params = _gemm_params(M, N, K, bm, bn, bk)
    params[40:48] = np.frombuffer(i64(N * K).tobytes(), np.uint8)  # batch_stride_b
    expected = np.stack([numbers(b, kind)[e] @ row for e, row in zip(expert, numbers(a, kind), strict=True)])
    return Run(
        (STEEL, "steel/gemm/kernels/steel_gemm_gather.h"),
        f'instantiate_kernel("k", gather_mm_rhs, {kind}, {bm}, {bn}, {bk}, 1, 2, false, true, float)',
        {"A": a, "B": b, "offsets": starts, "C": out(kind, M, N), "params": params, "num_groups": scalar(E)},
        ((N + bn - 1) // bn * 32, ((M + bm - 1) // bm + E) * 2, 1),
        (32, 2, 1),
        "C",
        kind,
        expected,
        dot_error(kind, K),
        {10: False, 200: M % bm == 0, 201: N % bn == 0, 202: K % bk == 0},
    )


def gemv(kind: str, N: int, K: int) -> Run:
    return _gemv(kind, N, K, 8, 1)


def gemv_wide(kind: str, N: int, K: int) -> Run:
    """Eight simdgroups share a row."""
    return _gemv(kind, N, K, 1, 8)


def _gemv(kind: str, N: int, K: int, bm: int, bn: int) -> Run:
    matrix, vector = of(kind, normal(N, K)), of(kind, normal(K, seed=1))
    tm = 4
    return Run(
        ("gemv.h",),
        f'instantiate_kernel("k", gemv, {kind}, {bm}, {bn}, 1, 32, {tm}, 4, false, false)',
        {
            "mat": matrix,
            "in_vec": vector,
            "bias": of(kind, np.zeros(1)),
            "out_vec": out(kind, N),
            "in_vec_size": scalar(K),
            "out_vec_size": scalar(N),
            "marix_ld": scalar(K),
            "alpha": scalar(1, np.float32),
            "beta": scalar(0, np.float32),
            "batch_ndim": scalar(1),
            "batch_shape": i32(1),
            "vector_batch_stride": i64(0),
            "matrix_batch_stride": i64(0),
            "bias_batch_stride": i64(0),
            "bias_stride": scalar(1),
        },
        ((N + bm * tm - 1) // (bm * tm) * 32, bn, bm),
        (32, bn, bm),
        "out_vec",
        kind,
        numbers(matrix, kind) @ numbers(vector, kind),
        dot_error(kind, K),
    )


def gemv_several(kind: str, M: int, N: int, K: int, bias: bool = False) -> Run:
    """One matrix, a few vectors: three of them share what a threadgroup reads."""
    vectors, lanes = 3, 32
    matrix, vector = of(kind, normal(N, K)), of(kind, normal(M, K, seed=1))
    added = of(kind, normal(M, N, seed=2))
    exact = numbers(vector, kind) @ numbers(matrix, kind).T
    rows = lanes // 8
    return Run(
        ("gemv.h",),
        f'instantiate_kernel("k", gemv_wide, {kind}, {vectors}, {lanes})',
        {
            "mat": matrix,
            "in_vec": vector,
            "bias": added,
            "out_vec": out(kind, M, N),
            "in_vec_size": scalar(K),
            "out_vec_size": scalar(N),
            "M": scalar(M),
            "matrix_ld": scalar(K),
            "vector_ld": scalar(K),
            "alpha": scalar(0.5, np.float32),
            "beta": scalar(2, np.float32),
            "batch_ndim": scalar(1),
            "batch_shape": i32(1),
            "vector_batch_stride": i64(0),
            "matrix_batch_stride": i64(0),
            "bias_batch_stride": i64(0),
            "bias_ld": scalar(N),
            "bias_fd": scalar(1),
        },
        (32, (N + rows - 1) // rows * rows, 1),
        (32, rows, 1),
        "out_vec",
        kind,
        0.5 * exact + 2 * numbers(added, kind) if bias else exact,
        dot_error(kind, K),
        {0: False, 1: bias},
    )


def gemv_gather(kind: str, N: int, K: int) -> Run:
    """The mat-vec of decoding without quantization: each route has its expert."""
    experts = (3, 1, 4, 0)
    matrix, vector = of(kind, normal(5, N, K)), of(kind, normal(1, K, seed=1))
    bm, tm = 8, 4
    return Run(
        ("gemv.h",),
        f'instantiate_kernel("k", gemv_gather, {kind}, {bm}, 1, 1, 32, {tm}, 4)',
        {
            "mat": matrix,
            "in_vec": vector,
            "bias": of(kind, np.zeros(1)),
            "out_vec": out(kind, len(experts), N),
            "in_vec_size": scalar(K),
            "out_vec_size": scalar(N),
            "marix_ld": scalar(K),
            "alpha": scalar(1, np.float32),
            "beta": scalar(0, np.float32),
            "batch_ndim": scalar(1),
            "batch_shape": i32(len(experts)),
            "index_batch_strides": i64(1, 1),
            "vector_batch_ndim": scalar(1),
            "vector_batch_shape": i32(1),
            "vector_batch_stride": i64(K),
            "matrix_batch_ndim": scalar(1),
            "matrix_batch_shape": i32(5),
            "matrix_batch_stride": i64(N * K),
            "vec_indices": np.zeros(len(experts), np.uint32),
            "mat_indices": np.array(experts, np.uint32),
        },
        ((N + bm * tm - 1) // (bm * tm) * 32, 1, bm * len(experts)),
        (32, 1, bm),
        "out_vec",
        kind,
        numbers(matrix, kind)[list(experts)] @ numbers(vector, kind)[0],
        dot_error(kind, K),
    )


def softmax(kind: str, rows: int, size: int, precise: bool = True) -> Run:
    looped = size > 4096
    x = of(kind, normal(rows, size) * 3)
    threads = 1024 if looped else (size + 127) // 128 * 32
    exact = numbers(x, kind)
    exact = np.exp(exact - exact.max(-1, keepdims=True))
    accumulator = "float" if precise else kind
    return Run(
        ("softmax.h",),
        f'instantiate_kernel("k", softmax_{"looped" if looped else "single_row"}, {kind}, {accumulator})',
        {"in": x, "out": out(kind, rows, size), "axis_size": scalar(size)},
        (rows * threads, 1, 1),
        (threads, 1, 1),
        "out",
        kind,
        exact / exact.sum(-1, keepdims=True),
        (8 if precise else 64) * ROUNDOFF[kind],
    )


def logsumexp(kind: str, rows: int, size: int) -> Run:
    looped = size > 4096
    x = of(kind, normal(rows, size) * 3)
    threads = 1024 if looped else (size + 127) // 128 * 32
    return Run(
        ("logsumexp.h",),
        f'instantiate_kernel("k", logsumexp{"_looped" if looped else ""}, {kind})',
        {"in": x, "out": out(kind, rows), "axis_size": scalar(size)},
        (rows * threads, 1, 1),
        (threads, 1, 1),
        "out",
        kind,
        np.log(np.exp(numbers(x, kind)).sum(-1)),
        8 * ROUNDOFF[kind],
    )


GATHER = """
[[kernel]] void k(
    const device {T}* src [[buffer(0)]], device {T}* out [[buffer(1)]], const constant int* src_shape
    [[buffer(2)]],
    const constant int64_t* src_strides [[buffer(3)]], const constant size_t& src_ndim [[buffer(4)]],
    const constant int* slice_sizes [[buffer(5)]], const constant int* axes [[buffer(6)]],
    const constant int* idx_shapes [[buffer(7)]], const constant int64_t* idx_strides [[buffer(8)]],
    const constant bool* idx_contigs [[buffer(9)]], const constant int& idx_ndim [[buffer(10)]],
    const device uint32_t* idx0 [[buffer(20)]],
    uint3 index [[thread_position_in_grid]], uint3 grid_dim [[threads_per_grid]]) {{
  Indices<uint32_t, 1> idxs{{{{idx0}}, idx_shapes, idx_strides, idx_contigs, idx_ndim}};
  return gather_impl<{T}, uint32_t, 1, 1, int>(
      src, out, src_shape, src_strides, src_ndim, slice_sizes, axes, idxs, index, grid_dim);
}}
"""


def gather(kind: str, rows: int, columns: int, count: int) -> Run:
    """Rows of a matrix, through the function that MLX writes a kernel around."""
    src = of(kind, normal(rows, columns))
    index = np.random.default_rng(1).integers(0, rows, count).astype(np.uint32)
    return Run(
        ("indexing/gather.h",),
        GATHER.format(T=kind),
        {
            "src": src,
            "out": out(kind, count, columns),
            "src_shape": i32(rows, columns),
            "src_strides": i64(columns, 1),
            "src_ndim": scalar(2, np.uint64),
            "slice_sizes": i32(1, columns),
            "axes": i32(0),
            "idx_shapes": i32(count),
            "idx_strides": i64(1),
            "idx_contigs": np.ones(1, np.bool_),
            "idx_ndim": scalar(1),
            "idx0": index,
        },
        (count, 1, columns),
        (4, 1, 32),
        "out",
        kind,
        numbers(src, kind)[index],
        0.0,
    )


def sdpa_vector(kind: str, heads: int, kv_heads: int, length: int, size: int, extra: str = "") -> Run:
    """One query for each head.

    Args:
        extra: ``bool`` or ``float``: a mask of that kind; ``sinks``: a score for each head without a value.
    """
    q = of(kind, normal(heads, 1, size))
    k, v = of(kind, normal(kv_heads, length, size, seed=1)), of(kind, normal(kv_heads, length, size, seed=2))
    repeat = heads // kv_heads
    scores = np.einsum("hqd,hkd->hqk", numbers(q, kind), np.repeat(numbers(k, kind), repeat, 0)) * size**-0.5
    kept = np.random.default_rng(3).random((heads, 1, length)) < 0.7
    added, sinks = of(kind, normal(heads, 1, length, seed=4)), of(kind, normal(heads, seed=5))
    if extra == "bool":
        scores = np.where(kept, scores, -np.inf)
    elif extra == "float":
        scores += numbers(added, kind)
    sink = numbers(sinks, kind)[:, None, None] if extra == "sinks" else np.full((heads, 1, 1), -np.inf)
    most = np.maximum(scores.max(-1, keepdims=True), sink)
    weights = np.exp(scores - most)
    weights /= weights.sum(-1, keepdims=True) + np.exp(sink - most)
    masked = extra in ("bool", "float")
    return Run(
        ("sdpa_vector.h",),
        f'instantiate_kernel("k", sdpa_vector, {kind}, {size}, {size})',
        {
            "queries": q,
            "keys": k,
            "values": v,
            "out": out(kind, heads, 1, size),
            "gqa_factor": scalar(repeat),
            "N": scalar(length),
            "k_head_stride": scalar(length * size, np.uint64),
            "k_seq_stride": scalar(size, np.uint64),
            "v_head_stride": scalar(length * size, np.uint64),
            "v_seq_stride": scalar(size, np.uint64),
            "scale": scalar(size**-0.5, np.float32),
            "bmask": kept,
            "fmask": added,
            "mask_kv_seq_stride": scalar(1),
            "mask_q_seq_stride": scalar(length),
            "mask_head_stride": scalar(length),
            "sinks": sinks,
            "num_q_heads": scalar(heads),
        },
        (heads * 1024, 1, 1),
        (1024, 1, 1),
        "out",
        kind,
        weights @ np.repeat(numbers(v, kind), repeat, 0),
        16 * ROUNDOFF[kind],
        {
            20: masked,
            21: False,
            22: False,
            23: extra == "bool",
            24: extra == "float",
            25: extra == "sinks",
            26: 0,
        },
    )
