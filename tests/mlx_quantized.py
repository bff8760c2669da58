"""MLX's quantized kernels: mat-vec, gathered mat-vec and gathered products, affine and floating-point
formats."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx_kernels import TYPES, Run, bits, dot_error, i32, i64, normal, numbers, of, out, scalar

AFFINE = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h")
FP = ("steel/gemm/gemm.h", "quantized_utils.h", "fp_quantized.h")
# Group size and bits.
FORMATS = {"mxfp4": (32, 4), "mxfp8": (32, 8), "nvfp4": (16, 4)}


class Stack:
    """Quantized weights of E experts, [E, N, K]: buffers, what the kernels are told of them, and their
    values."""

    def __init__(self, kind: str, mode: str, bits_: int, E: int, N: int, K: int) -> None:
        self.affine = mode == "affine"
        self.group, self.bits = (64, bits_) if self.affine else FORMATS[mode]
        w = mx.array(normal(E, N, K)).astype(TYPES[kind])
        parts = mx.quantize(w, self.group, self.bits, mode=mode)
        exact = [part.astype(mx.float32) if i and self.affine else part for i, part in enumerate(parts)]
        more = {} if self.affine else {"dtype": mx.float32}
        values = mx.dequantize(*exact, group_size=self.group, bits=self.bits, mode=mode, **more)
        self.values = np.array(values).astype(np.float64)
        row, groups = parts[0].shape[-1], K // self.group
        self.buffers: dict[str, Any] = {
            **dict(zip(("w", "scales", "biases"), map(bits, parts), strict=False)),
            "global_scale": np.zeros(1, np.float32),
            "w_batch_ndims": scalar(1),
            "w_shape": i32(E, N, row),
            "w_strides": i64(N * row, row, 1),
            "s_strides": i64(N * groups, groups, 1),
            "b_strides": i64(N * groups, groups, 1),
        }
        self.prefix = "affine" if self.affine else "fp"
        self.headers = AFFINE if self.affine else FP
        self.template = f"{kind}, {self.group}, {self.bits}"


def _fast(bits_: int, N: int, K: int) -> str:
    """Whether MLX takes the kernel without checks of bounds."""
    return "_fast" if N % 8 == 0 and K % (256 if bits_ == 6 else 512) == 0 else ""


def _overlaps(N: int) -> bool:
    """Whether the last of the threadgroups that compute 8 rows each starts earlier, so as not to end late: it
    writes some rows once more."""
    return N % 8 != 0


def qmv(kind: str, bits_: int, mode: str, N: int, K: int) -> Run:
    stack = Stack(kind, mode, bits_, 1, N, K)
    x = of(kind, normal(1, K, seed=1))
    return Run(
        stack.headers,
        f'instantiate_kernel("k", {stack.prefix}_qmv{_fast(stack.bits, N, K)}, {stack.template}, false)',
        {
            **stack.buffers,
            "x": x,
            "y": out(kind, N),
            "in_vec_size": scalar(K),
            "out_vec_size": scalar(N),
            "x_batch_ndims": scalar(0),
            "x_shape": i32(1, K),
            "x_strides": i64(K, 1),
        },
        (32, (N + 7) // 8 * 2, 1),
        (32, 2, 1),
        "y",
        kind,
        stack.values[0] @ numbers(x, kind)[0],
        dot_error(kind, K),
        equal_writes=_overlaps(N),
    )


def qmm_t(kind: str, bits_: int, mode: str, M: int, N: int, K: int) -> Run:
    """Several tokens, one matrix; M and N may leave a part of a tile."""
    stack = Stack(kind, mode, bits_, 1, N, K)
    x = of(kind, normal(M, K, seed=1))
    aligned = "true" if N % 32 == 0 else "false"
    return Run(
        stack.headers,
        f'instantiate_kernel("k", {stack.prefix}_qmm_t, {stack.template}, {aligned}, false)',
        {
            **stack.buffers,
            "x": x,
            "y": out(kind, M, N),
            "K": scalar(K),
            "N": scalar(N),
            "M": scalar(M),
            "x_batch_ndims": scalar(0),
            "x_shape": i32(M, K),
            "x_strides": i64(K, 1),
        },
        ((N + 31) // 32 * 32, (M + 31) // 32 * 2, 2),
        (32, 2, 2),
        "y",
        kind,
        numbers(x, kind) @ stack.values[0].T,
        dot_error(kind, K) + dot_error(kind, 1),  # weights are rounded to the activations' type
    )


def gather_qmv(kind: str, bits_: int, mode: str, N: int, K: int) -> Run:
    """The mat-vec of decoding: each route has its expert."""
    experts = (3, 1, 4, 0)
    stack = Stack(kind, mode, bits_, 5, N, K)
    x = of(kind, normal(1, 1, K, seed=1))
    return Run(
        stack.headers,
        f'instantiate_kernel("k", {stack.prefix}_gather_qmv{_fast(stack.bits, N, K)}, {stack.template})',
        {**stack.buffers, **_routes(experts), "x": x, "y": out(kind, len(experts), N), **_vector(N, K)},
        (32, (N + 7) // 8 * 2, len(experts)),
        (32, 2, 1),
        "y",
        kind,
        stack.values[list(experts)] @ numbers(x, kind)[0, 0],
        dot_error(kind, K),
        equal_writes=_overlaps(N),
    )


def _routes(experts: tuple[int, ...]) -> dict[str, Any]:
    return {
        "lhs_indices": np.zeros(len(experts), np.uint32),
        "rhs_indices": np.array(experts, np.uint32),
        "batch_ndims": scalar(1),
        "batch_shape": i32(len(experts)),
        "lhs_strides": i64(1),
        "rhs_strides": i64(1),
    }


def _vector(N: int, K: int) -> dict[str, Any]:
    return {
        "in_vec_size": scalar(K),
        "out_vec_size": scalar(N),
        "x_batch_ndims": scalar(1),
        "x_shape": i32(1, 1, K),
        "x_strides": i64(K, K, 1),
    }


def gather_qmm_t(kind: str, bits_: int, mode: str, M: int, N: int, K: int) -> Run:
    """Several tokens for each of two experts; M and N may leave a part of a tile."""
    experts = (2, 0)
    stack = Stack(kind, mode, bits_, 4, N, K)
    x = of(kind, normal(1, M, K, seed=1))
    aligned = "true" if N % 32 == 0 else "false"
    return Run(
        stack.headers,
        f'instantiate_kernel("k", {stack.prefix}_gather_qmm_t, {stack.template}, {aligned})',
        {
            **stack.buffers,
            **_routes(experts),
            "x": x,
            "y": out(kind, len(experts), M, N),
            "K": scalar(K),
            "N": scalar(N),
            "M": scalar(M),
            "x_batch_ndims": scalar(1),
            "x_shape": i32(1, M, K),
            "x_strides": i64(M * K, K, 1),
        },
        ((N + 31) // 32 * 32, (M + 31) // 32 * 2, len(experts) * 2),
        (32, 2, 2),
        "y",
        kind,
        np.stack([numbers(x, kind)[0] @ stack.values[e].T for e in experts]),
        dot_error(kind, K) + dot_error(kind, 1),  # weights are rounded to the activations' type
    )


def gather_qmm_rhs(kind: str, bits_: int, mode: str, counts: tuple[int, ...], N: int, K: int) -> Run:
    """Tokens sorted by expert: ``counts`` of them for each."""
    bm, bn, bk = 16, 32, 32
    tile = f"{bm}, {bn}, {bk}, 1, 2"
    M, E = sum(counts), len(counts)
    stack = Stack(kind, mode, bits_, E, N, K)
    x = of(kind, normal(M, K, seed=1))
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]]).astype(np.int32)
    expert = np.repeat(np.arange(E), counts)
    expected = np.stack([stack.values[e] @ row for e, row in zip(expert, numbers(x, kind), strict=True)])
    return Run(
        stack.headers,
        f'instantiate_kernel("k", {stack.prefix}_gather_qmm_rhs, {stack.template}, {tile}, true)',
        {
            **stack.buffers,
            "x": x,
            "offsets": starts,
            "y": out(kind, M, N),
            "M": scalar(M),
            "N": scalar(N),
            "K": scalar(K),
            "num_groups": scalar(E),
        },
        ((N + bn - 1) // bn * 32, ((M + bm - 1) // bm + E) * 2, 1),
        (32, 2, 1),
        "y",
        kind,
        expected,
        dot_error(kind, K) + dot_error(kind, 1),
        {200: M % bm == 0, 201: N % bn == 0, 202: K % bk == 0},
    )
