"""The kernels Apple's compiler made, from MLX's macOS wheel, against MLX's headers: equal in every bit.

`make oracle` fetches them.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_plain as plain
import mlx_quantized as quantized
import mlx_reductions as reductions
import numpy as np
import pytest
from mlx_kernels import Run, bits, scalar

from moefast.emulator import air
from moefast.emulator.metallib import Metallib
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)


PLACES = (
    Path(__file__).resolve().parents[1] / "build" / "oracle" / "mlx" / "lib" / "mlx.metallib",
    Path(mx.__file__).resolve().parent / "lib" / "mlx.metallib",  # on a Mac
)
# The names MLX gives types: in quantized kernels those of Metal, elsewhere its own.
OWN = {"float": "float32", "float16_t": "float16", "bfloat16_t": "bfloat16"}


@pytest.fixture(scope="module")
def metallib() -> Metallib:
    for place in PLACES:
        if place.exists():
            return Metallib(place)
    pytest.skip("needs Apple-compiled kernels: make oracle")


CASES: dict[str, Callable[[], Run]] = {}
for kind, own in OWN.items():
    for width in (2, 3, 4, 5, 6, 8):
        name = f"{kind}_gs_64_b_{width}"
        CASES[f"affine_gather_qmv_fast_{name}"] = lambda k=kind, w=width: quantized.gather_qmv(
            k, w, "affine", 16, 512
        )
        CASES[f"affine_gather_qmv_{name}"] = lambda k=kind, w=width: quantized.gather_qmv(
            k, w, "affine", 10, 192
        )
    CASES[f"affine_qmv_fast_{kind}_gs_64_b_4_batch_0_pr_0_hgs_0_r_4"] = lambda k=kind: quantized.qmv(
        k, 4, "affine", 16, 512
    )
    CASES[f"affine_gather_qmm_t_{kind}_gs_64_b_4_alN_true"] = lambda k=kind: quantized.gather_qmm_t(
        k, 4, "affine", 33, 32, 128
    )
    CASES[f"affine_gather_qmm_rhs_nt_{kind}_gs_64_b_4_bm_16_bn_32_bk_32_wm_1_wn_2"] = lambda k=kind: (
        quantized.gather_qmm_rhs(k, 4, "affine", (5, 0, 17, 10), 64, 128)
    )
    CASES[f"steel_gather_mm_rhs_nt_{own}_{own}_bm16_bn64_bk16_wm1_wn2"] = lambda k=kind: plain.gather_mm_rhs(
        k, (5, 0, 17, 10), 64, 48
    )
    CASES[f"gemv_{own}_bm8_bn1_sm1_sn32_tm4_tn4_nc0_axpby0"] = lambda k=kind: plain.gemv(k, 40, 700)
    for mode, (group, width) in quantized.FORMATS.items():
        name = f"{kind}_gs_{group}_b_{width}"
        CASES[f"{mode}_gather_qmv_fast_{name}"] = lambda k=kind, m=mode: quantized.gather_qmv(
            k, 0, m, 16, 512
        )
        CASES[f"{mode}_gather_qmv_{name}"] = lambda k=kind, m=mode: quantized.gather_qmv(k, 0, m, 10, 192)
        CASES[f"{mode}_gather_qmm_t_{name}_alN_true"] = lambda k=kind, m=mode: quantized.gather_qmm_t(
            k, 0, m, 33, 32, 128
        )
    CASES[f"block_softmax_{own}"] = lambda k=kind: plain.softmax(k, 3, 700, False)
    CASES[f"looped_softmax_{own}"] = lambda k=kind: plain.softmax(k, 2, 5000, False)
    if kind != "float":
        CASES[f"block_softmax_precise_{own}"] = lambda k=kind: plain.softmax(k, 3, 700)
    CASES[f"block_logsumexp_{own}"] = lambda k=kind: plain.logsumexp(k, 3, 700)
    for operation in reductions.OPERATIONS:
        CASES[f"row_reduce_simple_{operation.lower()}{own}"] = lambda k=kind, o=operation: (
            reductions.row_reduce(k, o, 6, 300)
        )
        CASES[f"col_reduce_small_1_reduce_{operation.lower()}{own}"] = lambda k=kind, o=operation: (
            reductions.col_reduce_small(k, o, 7, 50)
        )
    CASES[f"col_reduce_looped_1_32_32_reduce_sum{own}"] = lambda k=kind: reductions.col_reduce_looped(
        k, "Sum", 100, 70
    )
    CASES[f"all_reduce_sum{own}"] = lambda k=kind: reductions.all_reduce(k, "Sum", 1000)
    CASES[f"c_block_sort_{own}_{own}_bn32_tn4"] = lambda k=kind: reductions.sort(k, 3, 100, False)
    CASES[f"carg_block_sort_{own}_uint32_bn128_tn4"] = lambda k=kind: reductions.sort(k, 2, 300, True)
    for name in plain.BINARY:
        CASES[f"vv_{name}{own}"] = lambda k=kind, n=name: plain.binary(k, n, 3000)


def some(name: str) -> Any:
    """All of bfloat and what has one type only; the rest is in the whole matrix."""
    return pytest.param(name, marks=() if "bfloat16" in name else pytest.mark.slow)


@pytest.mark.parametrize("name", [some(name) for name in CASES])
def test_header_equals_air(name: str, metallib: Metallib) -> None:
    run = CASES[name]()
    _, header = run.launch()
    kernel = air.load(metallib, name, run.constants)
    _, apple = run.launch(kernel)
    run.check(apple)
    differing = np.count_nonzero(header.view(np.uint8) != apple.view(np.uint8))
    assert differing == 0, f"{differing} of {header.nbytes} bytes"


@pytest.mark.parametrize("kind", OWN)
@pytest.mark.parametrize(
    "name", [n if n in ("Exp", "Sigmoid") else pytest.param(n, marks=pytest.mark.slow) for n in plain.UNARY]
)
def test_unary_header_equals_air_everywhere(name: str, kind: str, metallib: Metallib) -> None:
    """All 65,536 values of half types; of float, its 65,536 upper halves."""
    every = np.arange(65536, dtype=np.uint16)
    run = plain.unary(kind, name, 65536)
    run.buffers["in"] = {
        "float": (every.astype(np.uint32) << 16).view(np.float32),
        "float16_t": every.view(np.float16),
    }.get(kind, every)
    assert run.buffers["size"] == scalar(65536, np.uint32)
    _, header = run.launch()
    _, apple = run.launch(air.load(metallib, f"v_{name}{OWN[kind]}{OWN[kind]}"))
    # Which NaN an operation gives is not part of its definition.
    word = header.dtype.itemsize
    both_nan = np.isnan(_floats(header, kind)) & np.isnan(_floats(apple, kind))
    as_integers = f"u{word}"
    assert np.count_nonzero((header.view(as_integers) != apple.view(as_integers)) & ~both_nan) == 0


def _floats(array: np.ndarray, kind: str) -> np.ndarray:
    return np.array(mx.array(array).view(mx.bfloat16).astype(mx.float32)) if kind == "bfloat16_t" else array


def test_air_runs_in_check_mode(metallib: Metallib) -> None:
    run = quantized.gather_qmv("float16_t", 4, "affine", 16, 512)
    kernel = air.load(metallib, "affine_gather_qmv_fast_float16_t_gs_64_b_4")
    result, values = run.launch(kernel, mode="check", raises=False)
    assert result.findings == ()
    run.check(values)
    assert result.counters.buffers["w"].unique == 4 * 16 * 512 // 2
    short = dict(run.buffers, x=run.buffers["x"][..., :-8].copy())
    broken = Run(**{**run.__dict__, "buffers": short})
    found, _ = broken.launch(kernel, mode="check", raises=False)
    assert {finding.kind for finding in found.findings} == {"device-read-out-of-bounds"}
    assert {finding.buffer for finding in found.findings} == {"x"}


def test_function_constants_are_needed(metallib: Metallib) -> None:
    name = "affine_gather_qmm_rhs_nt_float_gs_64_b_4_bm_16_bn_32_bk_32_wm_1_wn_2"
    with pytest.raises(ValueError, match=r"needs the function constant align_\w \(20\d\)"):
        air.load(metallib, name)


def test_unknown_kernel_names_its_likes(metallib: Metallib) -> None:
    with pytest.raises(KeyError, match="vv_Addfloat32"):
        metallib.bitcode("vv_Adfloat32")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"MTLX" + bytes(200), "must be a Metal library"),
        (b"MTLB" + bytes(10), "must be a Metal library"),
    ],
)
def test_broken_files(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "broken.metallib"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        Metallib(file)


def test_truncated_file(tmp_path: Path) -> None:
    file = tmp_path / "short.metallib"
    header = b"MTLB" + bytes(20) + struct.pack("<8Q", 88, 100, 0, 0, 0, 0, 0, 0) + struct.pack("<I", 5)
    file.write_bytes(header)
    with pytest.raises(ValueError, match=r"must be a whole Metal library.*"):
        Metallib(file)


def test_bits_of_bfloat() -> None:
    assert bits(mx.array([1.0], mx.bfloat16)).tolist() == [0x3F80]
