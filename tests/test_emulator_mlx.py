"""MLX's own Metal headers, unmodified, from the installed wheel: right in both modes, and clean in check
mode."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import mlx_elementwise as elementwise
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
ROWS = (5, 0, 17, 10)  # of each expert
CASES: dict[str, Callable[[], Run]] = {}


def add(make: Callable[..., Run], *arguments: Any) -> None:
    CASES["-".join([make.__name__, *(str(a).replace(" ", "") for a in arguments if a != "")])] = lambda: make(
        *arguments
    )


for kind in KINDS:
    for mode, bits in [*(("affine", b) for b in (2, 3, 4, 5, 6, 8)), *((m, "") for m in quantized.FORMATS)]:
        add(quantized.qmv, kind, bits, mode, 16, 512)  # fast
        add(quantized.qmv, kind, bits, mode, 10, 192)  # with bounds
        add(quantized.qmm_t, kind, bits, mode, 33, 40, 128)  # parts of tiles
        add(quantized.gather_qmv, kind, bits, mode, 16, 512)
        add(quantized.gather_qmv, kind, bits, mode, 10, 192)
        add(quantized.gather_qmm_t, kind, bits, mode, 33, 40, 128)
        add(quantized.gather_qmm_rhs, kind, bits, mode, ROWS, 64, 128)
    add(plain.steel_gemm, kind, 40, 33, 48)
    add(plain.gather_mm_rhs, kind, ROWS, 64, 48)
    add(plain.gemv, kind, 12, 700)
    add(plain.gemv_gather, kind, 12, 700)
    for bias in (False, True):
        add(plain.gemv_several, kind, 5, 42, 1160, bias)
    add(plain.softmax, kind, 3, 700)
    add(plain.softmax, kind, 2, 5000)  # in a loop
    add(plain.logsumexp, kind, 3, 700)
    add(plain.logsumexp, kind, 2, 5000)
    for operation in reductions.OPERATIONS:
        add(reductions.row_reduce, kind, operation, 6, 300)
        add(reductions.col_reduce_small, kind, operation, 7, 50)
        add(reductions.col_reduce_looped, kind, operation, 100, 70)
        add(reductions.all_reduce, kind, operation, 1000)
    add(reductions.row_reduce, kind, "Sum", 6, 3000)  # several simdgroups
    for inclusive in (True, False):
        for reverse in (False, True):
            add(reductions.scan, kind, 2, 4096, inclusive, reverse)  # as many simdgroups as lanes
            add(reductions.strided_scan, kind, 40, 50, inclusive, reverse)
    for operation in reductions.SCANS:
        add(reductions.scan, kind, 2, 4096, True, False, operation)
        add(reductions.strided_scan, kind, 40, 50, True, False, operation)
    add(reductions.sort, kind, 3, 100, False)
    add(reductions.sort, kind, 2, 300, True)
    add(plain.gather, kind, 9, 40, 12)
    for extra in ("", "bool", "float", "sinks"):
        add(plain.sdpa_vector, kind, 4, 2, 50, 64, extra)
    for name in elementwise.UNARY:
        add(elementwise.unary, kind, name, 100)
    for name in elementwise.BINARY:
        add(elementwise.binary, kind, name, 100)
    for name in elementwise.COMPARISONS:
        add(elementwise.comparison, kind, name, 100)
    for source in KINDS:
        add(elementwise.cast, source, kind, 100)


def quick(name: str) -> bool:
    """Kernels of one template differ in type and width: bfloat, at 4 bits, is enough for every day."""
    make, kind, *rest = name.split("-")
    if hasattr(quantized, make) and rest[0] not in ("4", *quantized.FORMATS):
        return kind == "float16_t" and make in ("gather_qmv", "gather_qmm_rhs")
    return kind == "bfloat16_t" or make in ("steel_gemm", "softmax", "sdpa_vector")


def some(name: str) -> Any:
    return pytest.param(name, marks=() if quick(name) else pytest.mark.slow)


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


def kinds(run: Run, **options: Any) -> set[tuple[str, str]]:
    """What check mode finds, and where."""
    result, values = run.launch(mode="check", raises=False, **options)
    run.check(values)
    return {(found.kind, found.place.file.rsplit("/", 1)[-1]) for found in result.findings}


def test_what_mlx_itself_does_wrong_is_found() -> None:
    """All are harmless on today's GPUs, and all are there to be read: the values are right."""
    # The last threadgroup writes rows of the one before it once more, the same values.
    for mode, header in (("affine", "quantized.h"), ("mxfp4", "fp_quantized.h")):
        for make in (quantized.qmv, quantized.gather_qmv):
            run = make("float", 4, mode, 10, 192)
            assert kinds(run, allow_equal_writes=False) == {("device-equal-writes", header)}
    # Lanes beyond the number of simdgroups scan what nobody has written, and throw it away.
    assert kinds(reductions.scan("float", 2, 300, True, False)) == {("threadgroup-uninitialised", "scan.h")}
    # Of each simdgroup one lane comes to the barrier, which fences nothing.
    wide = plain.gemv_wide("float", 12, 700)
    assert ("barrier-divergence", "gemv.h") in kinds(wide)
