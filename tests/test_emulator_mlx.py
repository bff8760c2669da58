"""MLX's own Metal headers, unmodified, from the installed wheel: right in both modes, and clean in check
mode."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import mlx_plain as plain
import mlx_quantized as quantized
import mlx_reductions as reductions
import pytest
from mlx_kernels import Run

from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)


KINDS = ("float", "float16_t", "bfloat16_t")
CASES: dict[str, Callable[[], Run]] = {}


def add(make: Callable[..., Run], *arguments: Any) -> None:
    CASES["-".join([make.__name__, *(str(a).replace(" ", "") for a in arguments)])] = lambda: make(*arguments)


for kind in KINDS:
    for bits in (2, 3, 4, 5, 6, 8):
        add(quantized.gather_qmv, kind, bits, "affine", 16, 512)  # fast
    add(quantized.gather_qmm_t, kind, 4, "affine", 33, 40, 128)  # parts of tiles
    add(quantized.gather_qmm_rhs, kind, 4, "affine", (5, 0, 17, 10), 64, 128)
    add(plain.steel_gemm, kind, 40, 33, 48)
    add(plain.gather_mm_rhs, kind, (5, 0, 17, 10), 64, 48)
    add(plain.gemv, kind, 12, 700)
    add(plain.softmax, kind, 3, 700)
    add(plain.softmax, kind, 2, 5000)  # in a loop
    add(plain.logsumexp, kind, 3, 700)
    add(plain.logsumexp, kind, 2, 5000)
    for operation in reductions.OPERATIONS:
        add(reductions.row_reduce, kind, operation, 6, 300)
        add(reductions.col_reduce_small, kind, operation, 7, 50)
    add(reductions.all_reduce, kind, "Sum", 1000)
    add(reductions.col_reduce_looped, kind, "Sum", 100, 70)
    add(reductions.sort, kind, 3, 100, False)
    add(reductions.sort, kind, 2, 300, True)
    add(plain.gather, kind, 9, 40, 12)
    add(plain.sdpa_vector, kind, 4, 2, 50, 64)
    for name in plain.UNARY:
        add(plain.unary, kind, name, 100)
    for name in plain.BINARY:
        add(plain.binary, kind, name, 100)
for bits in (2, 3, 4, 5, 6, 8):
    add(quantized.qmv, "float", bits, "affine", 16, 512)
    add(quantized.gather_qmv, "float", bits, "affine", 10, 192)  # with bounds
    add(quantized.gather_qmm_t, "float16_t", bits, "affine", 8, 32, 64)
    add(quantized.gather_qmm_rhs, "float16_t", bits, "affine", (3, 9), 32, 64)
for mode in quantized.FORMATS:
    add(quantized.qmv, "float", 0, mode, 16, 512)
    for kind in KINDS:
        add(quantized.gather_qmv, kind, 0, mode, 16, 512)
    add(quantized.gather_qmv, "float", 0, mode, 10, 192)
    add(quantized.gather_qmm_t, "float16_t", 0, mode, 33, 40, 128)
    add(quantized.gather_qmm_rhs, "float16_t", 0, mode, (5, 0, 17, 10), 64, 128)
for inclusive in (True, False):
    for reverse in (True, False):
        add(reductions.scan, "float", 2, 4096, inclusive, reverse)  # as many simdgroups as lanes
add(reductions.strided_scan, "float", 40, 50)
add(reductions.row_reduce, "float", "Sum", 6, 3000)


# Of kernels that differ in their element type only, bfloat; the rest is in the whole matrix.
ALIKE = (
    "unary",
    "binary",
    "row_reduce",
    "col_reduce_small",
    "logsumexp",
    "gather_mm_rhs",
    "sort",
    "gemv",
    "gather-",
)


def some(name: str) -> Any:
    return pytest.param(
        name, marks=pytest.mark.slow if name.startswith(ALIKE) and "bfloat" not in name else ()
    )


@pytest.mark.parametrize("name", [some(name) for name in CASES])
def test_right_in_both_modes_and_clean(name: str) -> None:
    run = CASES[name]()
    kernel = run.kernel()
    _, fast = run.launch(kernel)
    run.check(fast)
    result, checked = run.launch(kernel, mode="check", raises=False)
    assert result.findings == ()
    # The two modes compute the same bits.
    assert fast.tobytes() == checked.tobytes()


def test_shuffled_schedules_give_the_same_bits() -> None:
    run = CASES["gather_qmm_t-float16_t-4-affine-33-40-128"]()
    kernel = run.kernel()
    results = {run.launch(kernel, mode="check", seed=seed)[1].tobytes() for seed in (None, 1, 2)}
    assert len(results) == 1


def kinds(run: Run) -> set[tuple[str, str]]:
    """What check mode finds, and where."""
    result, values = run.launch(mode="check", raises=False)
    run.check(values)
    return {(found.kind, found.place.file.rsplit("/", 1)[-1]) for found in result.findings}


def test_what_mlx_itself_does_wrong_is_found() -> None:
    """Both are harmless on today's GPUs, and both are there to be read: the values are right."""
    # Lanes beyond the number of simdgroups scan what nobody has written, and throw it away.
    assert kinds(reductions.scan("float", 2, 300, True, False)) == {("threadgroup-uninitialised", "scan.h")}
    # Of each simdgroup one lane comes to the barrier, which fences nothing.
    wide = plain.gemv_wide("float", 12, 700)
    assert ("barrier-divergence", "gemv.h") in kinds(wide)
