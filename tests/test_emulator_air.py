"""The kernels Apple's compiler made, from MLX's macOS wheel, against MLX's headers: equal in every bit.

`make oracle` fetches them.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_elementwise as elementwise
import mlx_plain as plain
import mlx_quantized as quantized
import numpy as np
import pytest
from mlx_air import BINARY, CASES, CASTS, COMPARISONS, OWN, UNARY
from mlx_kernels import TYPES, Run, bits, numbers

from moefast import emulator
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


@pytest.fixture(scope="module")
def metallib() -> Metallib:
    for place in PLACES:
        if place.exists():
            return Metallib(place)
    pytest.skip("needs Apple-compiled kernels: make oracle")


def some(name: str) -> Any:
    """Of kernels that differ in type, width and operation, one is enough for every day."""
    bits = re.match(r"affine_(\w+)_bfloat16_t_gs_64_b_(\d)", name)
    daily = "bfloat16" in name and (not bits or bits[2] == "4" or bits[1] == "gather_qmv_fast")
    if "_scan_" in name:
        daily = daily and "_inclusive_sum" in name
    return pytest.param(name, marks=() if daily else pytest.mark.slow)


@pytest.mark.parametrize("name", [some(name) for name in CASES])
def test_header_equals_air(name: str, metallib: Metallib) -> None:
    run = CASES[name]()
    _, header = run.launch()
    _, apple = run.launch(air.load(metallib, name.split()[0], run.constants))
    run.check(apple)
    differing = np.count_nonzero(header.view(np.uint8) != apple.view(np.uint8))
    assert differing == 0, f"{differing} of {header.nbytes} bytes"


# All values of half types, twice; of float each upper half, with two different lower halves.
EVERY = 2 * 65536
WORDS = {"float": np.uint32, "float16_t": np.uint16, "bfloat16_t": np.uint16}


def every(kind: str) -> np.ndarray:
    values = np.tile(np.arange(65536, dtype=np.uint32), 2)
    if kind != "float":
        return values.astype(np.uint16)
    lower = np.random.default_rng(7).integers(0, 65536, EVERY, dtype=np.uint32)
    lower[:32768] = 0
    return values << 16 | lower


def pairs(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Bits of pairs: each special value with each, any with any, and two that are not far from each other."""
    word = WORDS[kind]
    mantissa = {"float": 23, "float16_t": 10, "bfloat16_t": 7}[kind]
    infinity = {"float": 0x7F800000, "float16_t": 0x7C00, "bfloat16_t": 0x7F80}[kind]
    sign = 1 << (8 * word().itemsize - 1)
    one = int(bits(mx.array([1.0], TYPES[kind])).view(word)[0])
    step = 1 << mantissa
    positive = [0, 1, 2, step - 1, step, step + 1, step // 2, one - step, one - 1, one, one + 1]
    positive += [one + step, one + step // 2, one + 3 * step, one + 7 * step + 1]
    positive += [infinity - 1, infinity - step, infinity, infinity + step // 2]
    special = np.array([value | s for value in positive for s in (0, sign)], np.uint32)
    random = np.random.default_rng(8)
    rest = EVERY - special.size**2
    a = random.integers(0, 2 * sign, rest, dtype=np.uint64)
    b = random.integers(0, 2 * sign, rest, dtype=np.uint64)
    near = random.integers(0, 6 * step, rest, dtype=np.uint64)
    b[rest // 2 :] = ((a + near - 3 * step) % (2 * sign))[rest // 2 :]
    left = np.concatenate([np.repeat(special, special.size), a]).astype(word)
    return left, np.concatenate([np.tile(special, special.size), b]).astype(word)


def of_bits(words: np.ndarray, kind: str) -> np.ndarray:
    return words.view({"float": np.float32, "float16_t": np.float16}.get(kind, np.uint16))


def whole(cases: list[tuple[str, str, str, Callable[[int], Run]]], *always: str) -> list[Any]:
    """Parameters of a test: what is ``always`` run is named, in bfloat; the rest is in the whole matrix."""
    return [
        pytest.param(
            case,
            id=case[0],
            marks=() if "bfloat" in case[0] and any(a in case[0] for a in always) else pytest.mark.slow,
        )
        for case in cases
    ]


def assert_same(run: Run, name: str, result: str, metallib: Metallib) -> None:
    _, header = run.launch()
    _, apple = run.launch(air.load(metallib, name))
    # Which NaN an operation gives is not part of its definition.
    both_nan = np.isnan(numbers(header, result)) & np.isnan(numbers(apple, result))
    word = f"u{header.dtype.itemsize}"
    differs = (header.view(word) != apple.view(word)) & ~both_nan
    assert np.count_nonzero(differs) == 0, f"first at {np.flatnonzero(differs)[:8]}"


@pytest.mark.parametrize("case", whole(UNARY, "Exp", "Sigmoid") + whole(CASTS, "copybfloat16float32"))
def test_of_one_value_header_equals_air_everywhere(case: Any, metallib: Metallib) -> None:
    name, kind, result, make = case
    run = make(EVERY)
    run.buffers["src" if "copy" in name else "in"] = of_bits(every(kind), kind)
    assert_same(run, name, result, metallib)


@pytest.mark.parametrize("case", whole(BINARY, "Multiply", "Maximum") + whole(COMPARISONS, "LessEqual"))
def test_of_two_values_header_equals_air(case: Any, metallib: Metallib) -> None:
    name, kind, result, make = case
    run = make(EVERY)
    run.buffers["a"], run.buffers["b"] = (of_bits(words, kind) for words in pairs(kind))
    assert_same(run, name, result, metallib)


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


@pytest.mark.parametrize(
    ("extra", "absent"), [("", {11, 12, 13, 14, 15, 16, 17}), ("sinks", {11, 12, 13, 14, 15})]
)
def test_arguments_that_function_constants_take_away(
    extra: str, absent: set[int], metallib: Metallib
) -> None:
    run = plain.sdpa_vector("float", 4, 2, 50, 64, extra)
    kernel = air.load(metallib, "sdpa_vector_float_64_64", run.constants)
    assert set(kernel.signature.buffers) == set(range(18)) - set(absent)
    result, values = run.launch(kernel, mode="check", raises=False)
    assert result.findings == ()
    run.check(values)


def test_denormals_are_for_the_gpu_to_flush(metallib: Metallib) -> None:
    """MLX's developers compiled every kernel so; on Apple's GPUs x + 0 is 0 for those of float and bfloat."""
    assert all(b"air.compile.denorms_disable" in metallib.bitcode(name) for name in metallib)
    for kind, own in OWN.items():
        run = elementwise.binary(kind, "Add", 4)
        tiny = of_bits(np.array([1, 2, 3, 100], WORDS[kind]), kind)
        run.buffers["a"], run.buffers["b"] = tiny, np.zeros_like(tiny)
        kernel = air.load(metallib, f"vv_Add{own}")
        for mode in ("run", "check"):
            kept = run.launch(kernel, mode=mode)[1]
            flushed = run.launch(kernel, mode=mode, denormals="flush")[1]
            assert kept.tobytes() == tiny.tobytes()
            assert flushed.tobytes() == (tiny if kind == "float16_t" else np.zeros_like(tiny)).tobytes()


# A kernel that has its second buffer unless function constant 3 is true, and copies constant 4 to it.
AIR = """
@absent = internal addrspace(2) externally_initialized constant i8 undef
@scale = internal addrspace(2) externally_initialized constant {kind} undef
@present = internal addrspace(2) global i8 0
@llvm.global_ctors = appending global [1 x {{ i32, ptr, ptr }}] [{{ i32, ptr, ptr }} {{ i32 65535, ptr @init, ptr null }}]
@llvm.compiler.used = appending global [1 x ptr] [ptr addrspacecast (ptr addrspace(2) @present to ptr)]
define internal void @init() {{
  %1 = load {volatile} i8, ptr addrspace(2) @absent
  %2 = xor i8 %1, 1
  %3 = call i8 @air.normalize_function_constant_predicate.i8(i8 %2)
  store i8 %3, ptr addrspace(2) @present
  ret void
}}
declare i8 @air.normalize_function_constant_predicate.i8(i8)
define void @k(ptr addrspace(1) %0, ptr addrspace(1) %1) {{
  %3 = load i8, ptr addrspace(2) @present
  store i8 %3, ptr addrspace(1) %0
  %4 = icmp eq i8 %3, 0
  br i1 %4, label %7, label %5
5:
  %6 = load {kind}, ptr addrspace(2) @scale
  store {kind} %6, ptr addrspace(1) %1
  br label %7
7:
  ret void
}}
!air.kernel = !{{!0}}
!air.function_constants = !{{!5, !6}}
!0 = !{{ptr @k, !1, !2}}
!1 = !{{}}
!2 = !{{!3, !4}}
!3 = !{{i32 0, !"air.buffer", !"air.location_index", i32 0, i32 1, !"air.read_write", !"air.address_space", i32 1, !"air.arg_type_size", i32 1, !"air.arg_type_align_size", i32 1, !"air.arg_type_name", !"uchar", !"air.arg_name", !"flag"}}
!4 = !{{i32 1, !"air.function_constant", !7, !"air.buffer", !"air.location_index", i32 9, i32 1, !"air.read_write", !"air.address_space", i32 1, !"air.arg_type_size", i32 4, !"air.arg_type_align_size", i32 4, !"air.arg_type_name", !"float", !"air.arg_name", !"out"}}
!5 = !{{ptr addrspace(2) @absent, !"bool", !"absent", i32 3, i1 true}}
!6 = !{{ptr addrspace(2) @scale, !"float", !"scale", i32 4, i1 true}}
!7 = !{{ptr addrspace(2) @present, !"bool", !"present"}}
"""  # noqa: E501


class Text:
    """A library of one kernel, as text."""

    def __init__(self, kind: str = "float", volatile: str = "") -> None:
        self.text = AIR.format(kind=kind, volatile=volatile)

    def bitcode(self, name: str) -> bytes:
        return self.text.encode()


@pytest.mark.parametrize(
    ("kind", "dtype", "value"), [("float", np.float32, 0.1), ("half", np.float16, 0.1), ("i32", np.int32, -7)]
)
def test_function_constants_have_their_values(kind: str, dtype: Any, value: float) -> None:
    library: Any = Text(kind)
    outputs = {0: emulator.Output((1,), np.uint8), 9: emulator.Output((1,), dtype)}
    with_both = air.load(library, "k", {"absent": False, 4: value})
    assert set(with_both.signature.buffers) == {0, 9}
    for mode in ("run", "check"):
        buffers = emulator.launch(with_both, outputs, (1, 1, 1), (1, 1, 1), mode=mode).buffers
        assert buffers[0][0] == 1
        assert buffers[9][0] == dtype(value)
    with_one = air.load(library, "k", {3: True, 4: value})
    assert set(with_one.signature.buffers) == {0}
    assert emulator.launch(with_one, {0: outputs[0]}, (1, 1, 1), (1, 1, 1)).buffers[0][0] == 0


def test_arguments_are_known_when_compiled() -> None:
    library: Any = Text(volatile="volatile")
    with pytest.raises(ValueError, match="must decide its arguments when compiled, got @present at run time"):
        air.load(library, "k", {3: True, 4: 1.0})


MATRIX_AIR = """
declare <64 x {kind}> @air.simdgroup_matrix_8x8_load.v64{name}.p1{name}(ptr addrspace(1), i64, <2 x i64>, i1)
declare <64 x {kind}> @air.simdgroup_matrix_8x8_init_filled.v64{name}.{name}({kind})
declare <64 x {kind}> @air.simdgroup_matrix_8x8_multiply_accumulate.v64{name}.v64{name}.v64{name}.v64{name}(<64 x {kind}>, <64 x {kind}>, <64 x {kind}>)
declare void @air.simdgroup_matrix_8x8_store.v64{name}.p1{name}(<64 x {kind}>, ptr addrspace(1), i64, <2 x i64>, i1)
define void @k(ptr addrspace(1) %0, ptr addrspace(1) %1) {{
  %3 = call <64 x {kind}> @air.simdgroup_matrix_8x8_load.v64{name}.p1{name}(ptr addrspace(1) %0, i64 13, <2 x i64> <i64 3, i64 2>, i1 false)
  %4 = call <64 x {kind}> @air.simdgroup_matrix_8x8_load.v64{name}.p1{name}(ptr addrspace(1) %0, i64 13, <2 x i64> <i64 1, i64 0>, i1 true)
  %5 = call <64 x {kind}> @air.simdgroup_matrix_8x8_init_filled.v64{name}.{name}({kind} 2.5)
  %6 = call <64 x {kind}> @air.simdgroup_matrix_8x8_multiply_accumulate.v64{name}.v64{name}.v64{name}.v64{name}(<64 x {kind}> %3, <64 x {kind}> %4, <64 x {kind}> %5)
  call void @air.simdgroup_matrix_8x8_store.v64{name}.p1{name}(<64 x {kind}> %6, ptr addrspace(1) %1, i64 9, <2 x i64> <i64 1, i64 1>, i1 {transposed})
  ret void
}}
!air.kernel = !{{!0}}
!0 = !{{ptr @k, !1, !2}}
!1 = !{{}}
!2 = !{{!3, !4}}
!3 = !{{i32 0, !"air.buffer", !"air.location_index", i32 0, i32 1, !"air.read", !"air.address_space", i32 1, !"air.arg_type_size", i32 {bytes}, !"air.arg_type_align_size", i32 {bytes}, !"air.arg_name", !"x"}}
!4 = !{{i32 1, !"air.buffer", !"air.location_index", i32 1, i32 1, !"air.read_write", !"air.address_space", i32 1, !"air.arg_type_size", i32 {bytes}, !"air.arg_type_align_size", i32 {bytes}, !"air.arg_name", !"y"}}
"""  # noqa: E501


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("kind", "name", "dtype"), [("float", "f32", np.float32), ("half", "f16", np.float16)]
)
def test_matrices_of_a_simdgroup(kind: str, name: str, dtype: Any, transposed: bool) -> None:
    library: Any = Text()
    library.text = MATRIX_AIR.format(
        kind=kind, name=name, transposed=str(transposed).lower(), bytes=dtype().itemsize
    )
    kernel = air.load(library, "k")
    x = np.random.default_rng(0).integers(-4, 5, (10, 13)).astype(dtype)
    expected = np.zeros((9, 9), dtype)
    product = x[2:10, 3:11] @ x[:8, 1:9].T + dtype(2.5)
    expected[1:, 1:] = product.T if transposed else product
    for mode in ("run", "check"):
        y = np.zeros((9, 9), dtype)
        result = emulator.launch(kernel, {0: x, 1: y}, (32, 1, 1), (32, 1, 1), mode=mode)
        np.testing.assert_array_equal(result.buffers[1], expected)
    assert result.counters.buffers["y"].stored == 64 * x.itemsize
    short = emulator.launch(
        kernel, {0: x[:9].copy(), 1: y}, (32, 1, 1), (32, 1, 1), mode="check", raises=False
    )
    assert {found.kind for found in short.findings} == {"device-read-out-of-bounds"}


LARGE_AIR = """
define void @k(ptr addrspace(1) %0) #0 {
  %2 = alloca [1048576 x i8]
  %3 = load i64, ptr addrspace(1) %0
  %4 = getelementptr i8, ptr %2, i64 %3
  store volatile i8 1, ptr %4
  %5 = load volatile i8, ptr %2
  store i8 %5, ptr addrspace(1) %0
  ret void
}
attributes #0 = { nounwind }
!air.kernel = !{!0}
!0 = !{ptr @k, !1, !2}
!1 = !{}
!2 = !{!3}
!3 = !{i32 0, !"air.buffer", !"air.location_index", i32 0, i32 1, !"air.read_write", !"air.address_space", i32 1, !"air.arg_type_size", i32 8, !"air.arg_type_align_size", i32 8, !"air.arg_name", !"y"}
"""  # noqa: E501


@pytest.mark.parametrize("mode", ["run", "check"])
def test_variables_larger_than_the_stack(mode: Any) -> None:
    library: Any = Text()
    library.text = LARGE_AIR
    with pytest.raises(emulator.EmulatorError, match=r"more than \d+ bytes of variables"):
        emulator.launch(air.load(library, "k"), [np.zeros(1, np.uint64)], (1, 1, 1), (1, 1, 1), mode=mode)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_what_any_kernel_calls_is_supplied(metallib: Metallib) -> None:
    every_constant: dict[int | str, Any] = dict.fromkeys(range(400), 0)
    for name in sorted(metallib)[::97]:
        assert air.load(metallib, name, every_constant).signature.parameters


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
