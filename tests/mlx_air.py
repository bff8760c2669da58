"""Kernels of MLX's metallib by name, each with the launch that the same kernel of a header has."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import mlx_elementwise as elementwise
import mlx_plain as plain
import mlx_quantized as quantized
import mlx_reductions as reductions
from mlx_kernels import Run

# The names MLX gives types: in quantized kernels and attention those of Metal, elsewhere its own.
OWN = {"float": "float32", "float16_t": "float16", "bfloat16_t": "bfloat16"}
BITS = (2, 3, 4, 5, 6, 8)
ROWS = (5, 0, 17, 10)  # of each expert

Cases = Iterator[tuple[str, Callable[[], Run]]]


def _affine(kind: str) -> Cases:
    for bits in BITS:
        yield from _quantized(kind, "affine", bits, f"{kind}_gs_64_b_{bits}", "_0_pr_0_hgs_0_r_4")


def _fp(kind: str) -> Cases:
    for mode, (group, bits) in quantized.FORMATS.items():
        yield from _quantized(kind, mode, bits, f"{kind}_gs_{group}_b_{bits}", "_0_pr_0_hgs_0_r_4")


def _quantized(kind: str, mode: str, bits: int, name: str, dense: str) -> Cases:
    tile = "bm_16_bn_32_bk_32_wm_1_wn_2"
    yield f"{mode}_qmv_fast_{name}_batch{dense}", lambda: quantized.qmv(kind, bits, mode, 16, 512)
    yield f"{mode}_qmv_{name}_batch{dense}", lambda: quantized.qmv(kind, bits, mode, 10, 192)
    yield f"{mode}_qmm_t_{name}_alN_true_batch_0", lambda: quantized.qmm_t(kind, bits, mode, 33, 32, 128)
    yield f"{mode}_gather_qmv_fast_{name}", lambda: quantized.gather_qmv(kind, bits, mode, 16, 512)
    yield f"{mode}_gather_qmv_{name}", lambda: quantized.gather_qmv(kind, bits, mode, 10, 192)
    yield (
        f"{mode}_gather_qmm_t_{name}_alN_true",
        lambda: quantized.gather_qmm_t(kind, bits, mode, 33, 32, 128),
    )
    yield (
        f"{mode}_gather_qmm_rhs_nt_{name}_{tile}",
        lambda: quantized.gather_qmm_rhs(kind, bits, mode, ROWS, 64, 128),
    )


def _products(kind: str) -> Cases:
    own = OWN[kind]
    yield (
        f"steel_gemm_fused_nt_{own}_{own}_bm32_bn32_bk16_wm2_wn2",
        lambda: plain.steel_gemm(kind, 40, 33, 48),
    )
    yield (
        f"steel_gather_mm_rhs_nt_{own}_{own}_bm16_bn64_bk16_wm1_wn2",
        lambda: plain.gather_mm_rhs(kind, ROWS, 64, 48),
    )
    yield f"gemv_{own}_bm8_bn1_sm1_sn32_tm4_tn4_nc0_axpby0", lambda: plain.gemv(kind, 40, 700)
    yield f"gemv_gather_{own}_bm8_bn1_sm1_sn32_tm4_tn4", lambda: plain.gemv_gather(kind, 40, 700)
    if kind != "float":  # MLX compiles that one when asked
        for bias in (False, True):
            yield (
                f"gemv_wide_{own}_nv3_kl32{' bias' * bias}",
                lambda b=bias: plain.gemv_several(kind, 5, 42, 1160, b),
            )


def _rows(kind: str) -> Cases:
    own = OWN[kind]
    yield f"block_softmax_{own}", lambda: plain.softmax(kind, 3, 700, False)
    yield f"looped_softmax_{own}", lambda: plain.softmax(kind, 2, 5000, False)
    if kind != "float":
        yield f"block_softmax_precise_{own}", lambda: plain.softmax(kind, 3, 700)
    yield f"block_logsumexp_{own}", lambda: plain.logsumexp(kind, 3, 700)
    yield f"looped_logsumexp_{own}", lambda: plain.logsumexp(kind, 2, 5000)


def _attention(kind: str) -> Cases:
    for extra in ("", "bool", "float", "sinks"):
        yield (
            f"sdpa_vector_{kind}_64_64{extra and ' ' + extra}",
            lambda e=extra: plain.sdpa_vector(kind, 4, 2, 50, 64, e),
        )


def _reductions(kind: str) -> Cases:
    own = OWN[kind]
    for name in reductions.OPERATIONS:
        operation = f"{name.lower()}{own}"
        yield f"row_reduce_simple_{operation}", lambda n=name: reductions.row_reduce(kind, n, 6, 300)
        yield (
            f"col_reduce_small_1_reduce_{operation}",
            lambda n=name: reductions.col_reduce_small(kind, n, 7, 50),
        )
    yield (
        f"col_reduce_looped_1_32_32_reduce_sum{own}",
        lambda: reductions.col_reduce_looped(kind, "Sum", 100, 70),
    )
    yield f"all_reduce_sum{own}", lambda: reductions.all_reduce(kind, "Sum", 1000)
    yield f"c_block_sort_{own}_{own}_bn32_tn4", lambda: reductions.sort(kind, 3, 100, False)
    yield f"carg_block_sort_{own}_uint32_bn128_tn4", lambda: reductions.sort(kind, 2, 300, True)


def _scans(kind: str) -> Cases:
    own = OWN[kind]
    for name in reductions.SCANS:
        for inclusive in (True, False):
            for reverse in (False, True) if name == "Sum" else (False,):
                words = "reverse_" * reverse + ("in" if inclusive else "ex") + f"clusive_{name.lower()}"
                how = (inclusive, reverse, name)
                yield f"contig_scan_{words}_{own}_{own}", lambda h=how: reductions.scan(kind, 2, 300, *h)
                yield (
                    f"strided_scan_{words}_{own}_{own}",
                    lambda h=how: reductions.strided_scan(kind, 40, 50, *h),
                )


def _all() -> Cases:
    for kind in OWN:
        for some in (_affine, _fp, _products, _rows, _attention, _reductions, _scans):
            yield from some(kind)


# By the kernel's name; what follows a space tells launches of one kernel apart.
CASES = dict(_all())

# Element-wise kernels, which are compared on all values: name, type and launch of so many.
UNARY = [
    (f"v_{name}{own}{own}", kind, kind, lambda n, k=kind, o=name: elementwise.unary(k, o, n))
    for name in elementwise.UNARY
    for kind, own in OWN.items()
]
CASTS = [
    (f"v_copy{OWN[a]}{OWN[b]}", a, b, lambda n, a=a, b=b: elementwise.cast(a, b, n))
    for a in OWN
    for b in OWN
    if a != b
]
BINARY = [
    (f"vv_{name}{own}", kind, kind, lambda n, k=kind, o=name: elementwise.binary(k, o, n))
    for name in elementwise.BINARY
    for kind, own in OWN.items()
]
COMPARISONS = [
    (f"vv_{name}{own}", kind, "bool", lambda n, k=kind, o=name: elementwise.comparison(k, o, n))
    for name in elementwise.COMPARISONS
    for kind, own in OWN.items()
]
