"""A decode step of the experts as mlx-lm runs it on a GPU: MLX's own kernels, one after another, emulated."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_kernels import ROOT, TYPES, bits, i32, i64, out, scalar

from moefast import Activation, Projection, emulator
from moefast.emulator import air
from moefast.emulator.metallib import Metallib

KINDS = {dtype: kind for kind, dtype in TYPES.items()}
# As MLX names types in all but quantized kernels.
NAMES = {kind: str(dtype).removeprefix("mlx.core.") for kind, dtype in TYPES.items()}


@cache
def kernel(source: str) -> emulator.Kernel:
    return emulator.compile(source, "k", include_dirs=[emulator.mlx_include_dir()], name="mlx.metal")


def including(*headers: str) -> str:
    return "".join(f'#include "{ROOT}{header}"\n' for header in ("utils.h", *headers))


def array_of(buffer: np.ndarray, dtype: mx.Dtype) -> mx.array:
    array = mx.array(buffer)
    return array.view(mx.bfloat16) if dtype == mx.bfloat16 else array


@contextmanager
def compiled_by_apple(metallib: Metallib) -> Iterator[None]:
    """Within the block the kernels of MLX's library run as Apple's compiler made them, where they have a
    name there, instead of MLX's headers."""
    token = _apple.set(metallib)
    try:
        yield
    finally:
        _apple.reset(token)


@contextmanager
def checked() -> Iterator[list[emulator.Result]]:
    """Every launch within the block, in check mode, which counts bytes."""
    launches: list[emulator.Result] = []
    token = _checked.set(launches)
    try:
        yield launches
    finally:
        _checked.reset(token)


_apple: ContextVar[Metallib | None] = ContextVar("apple", default=None)
_checked: ContextVar[list[emulator.Result] | None] = ContextVar("checked", default=None)


def run(
    source: str,
    buffers: dict[str, Any],
    grid: tuple[int, int, int],
    threadgroup: tuple[int, int, int],
    result: str,
    *,
    name: str | None = None,
) -> np.ndarray:
    """Buffer ``result`` after a launch of kernel ``k`` of ``source``, ``name`` in MLX's library."""
    metallib, launches = _apple.get(), _checked.get()
    made = kernel(source) if metallib is None or name is None else air.load(metallib, name)
    named = {index: buffers[parameter.name] for index, parameter in made.signature.buffers.items()}
    launched = emulator.launch(made, named, grid, threadgroup, mode="run" if launches is None else "check")
    if launches is not None:
        launches.append(launched)
    (at,) = (i for i, parameter in made.signature.buffers.items() if parameter.name == result)
    return launched.buffers[at]


# -- activations -------------------------------------------------------------------------------------------

# What mx.compile makes one kernel of, as moefast/backends/reference/activations.py has it: the result of each
# line is a temporary of type T (or float, after a cast). A name in braces is a number.
_SILU = ["T s = Sigmoid()(g)", "T a = Multiply()(g, s)"]
_CLIP = ["T m = Maximum()(u, T(-{limit}))", "T c = Minimum()(m, T({limit}))"]
_GELU = [
    "T h = Multiply()(T(0.5f), v)",
    "T p = Power()(v, T(3))",
    "T q = Multiply()(T(0.044715f), p)",
    "T i = Add()(v, q)",
    "T j = Multiply()(T(0.79788456f), i)",
    "T t = Tanh()(j)",
    "T o = Add()(T(1), t)",
    "T a = Multiply()(h, o)",
]
_FLOAT = ["float G = static_cast<float>(g)", "float U = static_cast<float>(u)"]
_SITU = [
    *_FLOAT,
    "float d = Divide()(G, float({beta}))",
    "float t = Tanh()(d)",
    "float b = Multiply()(float({beta}), t)",
    "float s = Sigmoid()(G)",
    "float a = Multiply()(b, s)",
]
CHAINS: dict[str, list[str]] = {
    "swiglu": [*_SILU, "T y = Multiply()(a, u)"],
    "swiglu_oai": [
        "T n = Minimum()(g, T({limit}))",
        *_CLIP,
        "T l = Add()(c, T(1))",
        "T k = Multiply()(T({alpha}), n)",
        "T s = Sigmoid()(k)",
        "T a = Multiply()(n, s)",
        "T y = Multiply()(l, a)",
    ],
    "swiglu_clipped": [*_SILU, "T b = Minimum()(a, T({limit}))", *_CLIP, "T y = Multiply()(b, c)"],
    "swiglu_clamped": [
        *_FLOAT,
        "float n = Minimum()(G, float({limit}))",
        "float s = Sigmoid()(n)",
        "float a = Multiply()(n, s)",
        "float m = Maximum()(U, float(-{limit}))",
        "float c = Minimum()(m, float({limit}))",
        "float r = Multiply()(a, c)",
        "T y = static_cast<T>(r)",
    ],
    "geglu_tanh": ["T v = g", *_GELU, "T y = Multiply()(a, u)"],
    "situ": [*_SITU, "float r = Multiply()(a, U)", "T y = static_cast<T>(r)"],
    "situ bounded": [
        *_SITU,
        "float e = Divide()(U, float({linear_beta}))",
        "float w = Tanh()(e)",
        "float l = Multiply()(float({linear_beta}), w)",
        "float r = Multiply()(a, l)",
        "T y = static_cast<T>(r)",
    ],
    "gelu_tanh": ["T v = u", *_GELU, "T y = a"],
    "relu2": ["T k = Maximum()(u, T(0))", "T y = Square()(k)"],
}


def activate(kind: str, activation: Activation, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """The activation by MLX's own operations, in the kernel that it generates. Buffers of type ``kind``."""
    name = activation.name + " bounded" * (activation.linear_beta is not None)
    constants = {k: f"{np.float32(v)!s}f" for k, v in activation.parameters().items() if v is not None}
    lines = "".join(f"  {line.format(**constants)};\n" for line in CHAINS[name])
    source = (
        including("unary_ops.h", "binary_ops.h")
        + f"typedef {kind} T;\n[[kernel]] void k(device const T* gate [[buffer(0)]], "
        + "device const T* up [[buffer(1)]], device T* out [[buffer(2)]], "
        + "uint3 pos [[thread_position_in_grid]]) {\n  uint index = pos.x;\n"
        + f"  T g = gate[index];\n  T u = up[index];\n{lines}  out[index] = y;\n}}\n"
    )
    buffers = {"gate": gate, "up": up, "out": out(kind, *up.shape)}
    return run(source, buffers, (up.size, 1, 1), (256, 1, 1), "out")


# -- products ----------------------------------------------------------------------------------------------


def _is_fast(projection: Projection) -> bool:
    """The kernel without checks of bounds: MLX's gather_qmv."""
    assert projection.quant is not None
    layout = projection.layout
    step = {2: 512, 3: 512, 4: 512, 5: 512, 6: 256, 8: 256}[projection.quant.bits]
    return layout.in_dims % step == 0 and layout.out_dims % 8 == 0


def gather_qmv_source(projection: Projection, kind: str) -> str:
    quant = projection.quant
    assert quant is not None
    affine = quant.mode == "affine"
    headers = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h" if affine else "fp_quantized.h")
    name = f"{'affine' if affine else 'fp'}_gather_qmv{'_fast' * _is_fast(projection)}"
    more = "" if affine else f", {str(projection.global_scale is not None).lower()}"
    return (
        including(*headers)
        + f'instantiate_kernel("k", {name}, {kind}, {quant.group_size}, {quant.bits}{more})'
    )


def gather_qmv_buffers(
    projection: Projection, x: np.ndarray, rows: np.ndarray, experts: np.ndarray, kind: str
) -> dict[str, Any]:
    """Of x ``[rows, K]``: row ``rows[i]`` times the weight of ``experts[i]``."""
    layout = projection.layout
    E, N, K = max(layout.num_experts, 1), layout.out_dims, layout.in_dims
    weight, scales, biases, _, global_scale = projection.arrays
    assert scales is not None
    row, groups = weight.shape[-1], scales.shape[-1]
    return {
        "w": bits(weight),
        "scales": bits(scales),
        "biases": None if biases is None else bits(biases),
        "global_scale": np.zeros(1, np.float32) if global_scale is None else bits(global_scale),
        "x": x,
        "lhs_indices": rows.astype(np.uint32),
        "rhs_indices": experts.astype(np.uint32),
        "y": out(kind, len(experts), N),
        "in_vec_size": scalar(K),
        "out_vec_size": scalar(N),
        "x_batch_ndims": scalar(1),
        "x_shape": i32(len(x), 1, K),
        "x_strides": i64(K, K, 1),
        "w_batch_ndims": scalar(1),
        "w_shape": i32(E, N, row),
        "w_strides": i64(N * row, row, 1),
        "s_strides": i64(N * groups, groups, 1),
        "b_strides": i64(N * groups, groups, 1),
        "batch_ndims": scalar(1),
        "batch_shape": i32(len(experts)),
        "lhs_strides": i64(1),
        "rhs_strides": i64(1),
    }


def gather_qmv(
    projection: Projection, x: np.ndarray, rows: np.ndarray, experts: np.ndarray, kind: str
) -> np.ndarray:
    """``[routes, N]``: what gather_qmm launches for one row per route."""
    N = projection.layout.out_dims
    buffers = gather_qmv_buffers(projection, x, rows, experts, kind)
    grid = (32, (N + 7) // 8 * 2, len(experts))
    fast = "_fast" * _is_fast(projection)
    quant = projection.quant
    assert quant is not None
    name = f"{quant.mode}_gather_qmv{fast}_{kind}_gs_{quant.group_size}_b_{quant.bits}"
    name += "_hgs" * (projection.global_scale is not None)
    return run(gather_qmv_source(projection, kind), buffers, grid, (32, 2, 1), "y", name=name)


# -- what follows ------------------------------------------------------------------------------------------


def binary(kind: str, name: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """``name`` of MLX's binary_ops.h, of equal shapes."""
    source = (
        including("binary_ops.h", "binary.h") + f'instantiate_kernel("k", binary_vv, {kind}, {kind}, {name})'
    )
    buffers = {"a": a, "b": b, "c": out(kind, *a.shape), "size": scalar(a.size, np.uint32)}
    threads = (min(a.size, 1024), 1, 1)
    return run(source, buffers, (a.size, 1, 1), threads, "c", name=f"vv_{name}{NAMES[kind]}")


def unary(kind: str, name: str, x: np.ndarray) -> np.ndarray:
    source = including("unary_ops.h", "unary.h") + f'instantiate_kernel("k", unary_v, {kind}, {kind}, {name})'
    buffers = {"in": x, "out": out(kind, *x.shape), "size": scalar(x.size, np.uint32)}
    threads = (min(x.size, 1024), 1, 1)
    own = NAMES[kind]
    return run(source, buffers, (x.size, 1, 1), threads, "out", name=f"v_{name}{own}{own}")


def cast(x: np.ndarray, source: mx.Dtype, to: mx.Dtype) -> np.ndarray:
    """A copy of another dtype: exact, or rounded to nearest even, on any device."""
    return bits(array_of(x, source).astype(to))


def sum_of_rows(kind: str, x: np.ndarray) -> np.ndarray:
    """``[tokens, k, N]`` over k, as MLX launches its reduction: below 32 terms."""
    tokens, k, N = x.shape
    assert k < 32
    if k == 1:  # a copy
        return x[:, 0]
    source = (
        including("atomic.h", "reduction/ops.h", "reduce.h")
        + f'instantiate_kernel("k", col_reduce_small, {kind}, {kind}, Sum<{kind}>, int, 1)'
    )
    blocks = (N + 3) // 4
    tx, ty = min(blocks, 32), min(8, k)
    buffers = {
        "in": x,
        "out": out(kind, tokens, N),
        "reduction_size": scalar(k, np.uint64),
        "reduction_stride": scalar(N, np.int64),
        "shape": i32(tokens),
        "strides": i64(k * N),
        "ndim": scalar(1),
        "reduce_shape": i32(k),
        "reduce_strides": i64(N),
        "reduce_ndim": scalar(1),
        "non_col_reductions": scalar(1, np.uint64),
    }
    grid = ((blocks + tx - 1) // tx * tx, tokens * ty, 1)
    name = f"col_reduce_small_1_reduce_sum{NAMES[kind]}"
    return run(source, buffers, grid, (tx, ty, 1), "out", name=name)


def combine(y: np.ndarray, dtype: mx.Dtype, weights: np.ndarray, weights_dtype: mx.Dtype) -> np.ndarray:
    """``(y * weights[..., None]).sum(-2).astype(dtype)``: y ``[tokens, k, N]`` of ``dtype``."""
    promoted = dtype if dtype == weights_dtype else mx.float32
    kind = KINDS[promoted]
    y = cast(y, dtype, promoted)
    factors = np.broadcast_to(cast(weights, weights_dtype, promoted)[..., None], y.shape)
    total = sum_of_rows(kind, binary(kind, "Multiply", y, np.ascontiguousarray(factors)))
    return cast(total, promoted, dtype)


def qmv(projection: Projection, x: np.ndarray, kind: str) -> np.ndarray:
    """``[1, N]``: what quantized_matmul launches for one row x ``[1, K]``."""
    quant = projection.quant
    assert quant is not None
    affine = quant.mode == "affine"
    headers = ("steel/gemm/gemm.h", "quantized_utils.h", "quantized.h" if affine else "fp_quantized.h")
    step = {2: 512, 3: 512, 4: 512, 5: 512, 6: 256, 8: 256}[quant.bits]
    N, K = projection.layout.out_dims, projection.layout.in_dims
    # Without checks of bounds, or with rows that are not a multiple of a threadgroup's.
    fast, partial = K % step == 0, str(N % 8 != 0).lower()
    kernel_ = f"{'affine' if affine else 'fp'}_qmv{'_fast' * fast}"
    arguments = f"{kind}, {quant.group_size}, {quant.bits}, false" + f", {partial}" * fast
    buffers = gather_qmv_buffers(projection, x, np.zeros(1), np.zeros(1), kind)
    buffers |= {"x_batch_ndims": scalar(0), "x_shape": i32(1, K), "x_strides": i64(K, 1)}
    source = including(*headers) + f'instantiate_kernel("k", {kernel_}, {arguments})'
    grid = (32, (N + 7) // 8 * 2, 1)
    name = f"{quant.mode}_qmv{'_fast' * fast}_{kind}_gs_{quant.group_size}_b_{quant.bits}"
    name += f"_batch_0_pr_{int(fast and N % 8 != 0)}_hgs_0_r_4"
    return run(source, buffers, grid, (32, 2, 1), "y", name=name)
