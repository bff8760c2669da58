"""The twin of mx.fast.metal_kernel: the same source as the installed MLX's, character for character, the
same rules."""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import pytest

from moefast import emulator
from moefast.env import settings

pytestmark = pytest.mark.skipif(
    find_spec("ziglang") is None and not settings.clang, reason="needs the compiler of moefast[emulator]"
)

DTYPES = [
    *(mx.bool_, mx.uint8, mx.uint16, mx.uint32, mx.uint64, mx.int8, mx.int16, mx.int32, mx.int64),
    *(mx.float16, mx.bfloat16, mx.float32, mx.complex64),
]


@contextlib.contextmanager
def standard_output() -> Any:
    """What the process writes, C++ included: a function that gives it."""
    with tempfile.TemporaryFile() as file:
        kept = os.dup(1)
        os.dup2(file.fileno(), 1)
        try:
            yield lambda: (file.seek(0), file.read().decode())[1]
        finally:
            os.dup2(kept, 1)
            os.close(kept)


def mlx_source(arguments: dict[str, Any], call: dict[str, Any]) -> str:
    """What the installed MLX generates: it prints it while exporting, with Metal or without."""
    kernel = mx.fast.metal_kernel(**arguments)
    inputs = [mx.array(value) for value in call.pop("inputs")]

    def traced(*arrays: mx.array) -> list[mx.array]:
        return kernel(inputs=list(arrays), verbose=True, **call)

    with tempfile.TemporaryDirectory() as folder, standard_output() as text:
        mx.export_function(os.path.join(folder, "kernel.mlxfn"), traced, *inputs)
        printed = text()
    return printed.split("```\n", 1)[1].rsplit("\n```", 1)[0]


class Generated(NamedTuple):
    name: str
    arguments: dict[str, Any]
    call: dict[str, Any]


def generated(
    name: str,
    source: str,
    inputs: Sequence[Any],
    *,
    outputs: int = 1,
    dtype: Any = mx.float32,
    template: Any = None,
    **more: Any,
) -> Generated:
    arguments = {
        "name": name,
        "input_names": [f"in{i}" for i in range(len(inputs))],
        "output_names": [f"out{i}" for i in range(outputs)],
        "source": source,
        **more,
    }
    call = {
        "inputs": inputs,
        "output_shapes": [(4,)] * outputs,
        "output_dtypes": [dtype] * outputs,
        "grid": (4, 1, 1),
        "threadgroup": (4, 1, 1),
    }
    if template is not None:
        call["template"] = template
    return Generated(name, arguments, call)


ATTRIBUTES = "\n".join(f"(void){name};" for name in emulator.reflect.BUILTINS)
SOURCES = [
    generated("plain", "out0[thread_position_in_grid.x] = in0[0];", [mx.zeros(9)]),
    generated("seven", "out0[0] = in0[0];", [mx.zeros(7)]),  # constant
    generated("eight", "out0[0] = in0[0];", [mx.zeros(8)]),  # device
    generated("empty", "out0[0] = 0;", [mx.zeros(0)]),
    generated("scalar", "out0[0] = in0 + in1;", [mx.array(1.0), 2.5]),
    generated(
        "shapes", "out0[0] = in0_shape[0] + in0_strides[1] + in1_ndim;", [mx.zeros((3, 4)), mx.zeros((2, 2))]
    ),
    generated("scalar_shape", "// in0_shape in0_strides in0_ndim\nout0[0] = 0;", [mx.array(3)]),
    generated("many", "out0[0] = 1; out1[0] = 2;", [mx.zeros(9), mx.zeros(3)], outputs=2),
    generated("none", "out0[0] = 1;", []),
    generated("attributes", ATTRIBUTES + "\nout0[0] = in0[0];", [mx.zeros(9)]),
    generated(
        "header", "out0[0] = f(in0[0]);", [mx.zeros(9)], header="inline float f(float x) { return x; }\n"
    ),
    generated(
        "atomic", "atomic_store_explicit(&out0[0], 1.0f, memory_order_relaxed);", [], atomic_outputs=True
    ),
    generated(
        "template",
        "out0[0] = T(N) + B;",
        [mx.zeros(9, mx.bfloat16)],
        template=[("T", mx.bfloat16), ("N", 7), ("M", -2), ("B", True), ("C", False)],
    ),
    *(generated(f"dtype_{i}", "out0[0] = in0[0];", [mx.zeros(9, d)], dtype=d) for i, d in enumerate(DTYPES)),
]


@pytest.mark.parametrize("case", SOURCES, ids=lambda case: case.name)
def test_source_is_mlx_s(case: Generated) -> None:
    inputs = [mx.array(value) for value in case.call["inputs"]]
    ours = emulator.metal_kernel(**case.arguments).generated_source(
        inputs, case.call["output_dtypes"], case.call.get("template") or []
    )
    assert ours == mlx_source(case.arguments, dict(case.call))


def test_verbose_prints_what_mlx_prints(capfd: pytest.CaptureFixture[str]) -> None:
    case = SOURCES[0]
    emulator.metal_kernel(**case.arguments)(**case.call, verbose=True)
    assert mlx_source(case.arguments, dict(case.call)) in capfd.readouterr().out


def run(
    source: str, inputs: list[Any], shape: tuple[int, ...] = (64,), dtype: mx.Dtype = mx.float32, **more: Any
) -> mx.array:
    own = {
        key: more.pop(key)
        for key in list(more)
        if key in ("header", "ensure_row_contiguous", "atomic_outputs", "mode", "seed")
    }
    kernel = emulator.metal_kernel("probe", [f"in{i}" for i in range(len(inputs))], ["out"], source, **own)
    (out,) = kernel(
        inputs=inputs,
        output_shapes=[shape],
        output_dtypes=[dtype],
        grid=more.pop("grid", (64, 1, 1)),
        threadgroup=more.pop("threadgroup", (32, 1, 1)),
        **more,
    )
    return out


MODULES: list[Any] = [mx.fast, emulator]
CALL = {
    "inputs": [mx.zeros(64)],
    "output_shapes": [(64,)],
    "output_dtypes": [mx.float32],
    "grid": (64, 1, 1),
    "threadgroup": (64, 1, 1),
}
COPY = "uint i = thread_position_in_grid.x; out[i] = in0[i];"


@pytest.mark.parametrize("mode", ["run", "check"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 8, 64])
def test_every_dtype_through_constant_and_device(dtype: mx.Dtype, size: int, mode: str) -> None:
    x = (mx.arange(size) % 5).astype(dtype)
    out = run(COPY, [x], (size,), dtype, grid=(size, 1, 1), mode=mode)
    assert out.dtype == dtype
    assert mx.array_equal(out, x)


def test_threadgroup_is_clamped_to_the_grid() -> None:
    body = "out[thread_position_in_grid.x] = threads_per_threadgroup.x + 100 * threadgroups_per_grid.x;"
    assert run(body, [], (20,), grid=(20, 1, 1), threadgroup=(64, 1, 1)).tolist() == [120] * 20


def test_last_threadgroup_may_be_smaller() -> None:
    body = """
        uint i = thread_position_in_grid.x;
        out[i] = threads_per_threadgroup.x + 100 * dispatch_threads_per_threadgroup.x;
    """
    assert run(body, [], (40,), grid=(40, 1, 1)).tolist() == [3232] * 32 + [3208] * 8


def test_non_contiguous_input_is_copied_or_passed_with_its_strides() -> None:
    x = mx.arange(64, dtype=mx.float32).reshape(8, 8)
    for view in (x.T, x[::2, 1::3], mx.broadcast_to(x[0], (8, 8)), x[::-1]):
        assert mx.array_equal(run(COPY, [view], view.shape, grid=(view.size, 1, 1)), view)
        strided = """
            uint i = thread_position_in_grid.x;
            out[i] = in0[elem_to_loc(i, in0_shape, in0_strides, in0_ndim)];
        """
        same = run(strided, [view], view.shape, grid=(view.size, 1, 1))
        assert mx.array_equal(same, view)


def test_strides_are_those_of_the_view() -> None:
    view = mx.arange(64, dtype=mx.float32).reshape(8, 8).T
    body = "uint i = thread_position_in_grid.x; if (i < 2) out[i] = in0_strides[i];"
    assert run(body, [view], (2,), ensure_row_contiguous=False).tolist() == [1, 8]
    assert run(body, [view], (2,), ensure_row_contiguous=True).tolist() == [8, 1]


def test_strided_input_without_copy() -> None:
    x = mx.arange(64, dtype=mx.float32).reshape(8, 8)
    body = """
        uint i = thread_position_in_grid.x;
        out[i] = in0[elem_to_loc(i, in0_shape, in0_strides, in0_ndim)];
    """
    for view in (x.T, x[::2, 1::3], mx.broadcast_to(x[0], (8, 8))):
        out = run(body, [view], view.shape, grid=(view.size, 1, 1), ensure_row_contiguous=False)
        assert mx.array_equal(out, view)


def test_negative_strides_are_copied_or_refused() -> None:
    x = mx.arange(64, dtype=mx.float32).reshape(8, 8)
    for view in (x[::-1], x[:, ::-2], x.T[::-1]):
        assert mx.array_equal(run(COPY, [view], view.shape, grid=(view.size, 1, 1)), view)
        with pytest.raises(ValueError, match=r"no negative strides, got .* of in0"):
            run(COPY, [view], view.shape, grid=(view.size, 1, 1), ensure_row_contiguous=False)


def test_init_value() -> None:
    body = "if (thread_position_in_grid.x < 3) out[thread_position_in_grid.x] = 1;"
    for dtype in (mx.float32, mx.bfloat16, mx.int32):
        assert run(body, [], (5,), dtype, init_value=2).tolist() == [1, 1, 1, 2, 2]


def test_init_value_may_be_read() -> None:
    body = "out[thread_position_in_grid.x] += 1;"
    assert run(body, [], mode="check", init_value=2.0).tolist() == [3] * 64
    with pytest.raises(emulator.EmulatorError, match="device-uninitialised"):
        run(body, [], mode="check")


def test_atomic_outputs() -> None:
    body = "atomic_fetch_add_explicit(&out[0], in0[thread_position_in_grid.x], memory_order_relaxed);"
    for dtype in (mx.int32, mx.uint32, mx.float32):
        x = mx.arange(64).astype(dtype)
        for mode in ("run", "check"):
            out = run(body, [x], (1,), dtype, atomic_outputs=True, init_value=0, mode=mode)
            assert out.item() == 64 * 63 / 2


def test_python_scalars_are_scalars() -> None:
    assert run("out[thread_position_in_grid.x] = in0 + in1 + in2;", [2, 0.5, True]).tolist() == [3.5] * 64


def test_template_arguments() -> None:
    body = "out[thread_position_in_grid.x] = B ? T(N) / T(2) : T(0);"
    template = [("T", mx.int32), ("N", 7), ("B", True)]
    assert run(body, [], template=template).tolist() == [3] * 64


def test_source_of_different_dtypes_in_one_object() -> None:
    kernel = emulator.metal_kernel("probe", ["in0"], ["out"], COPY)
    for dtype in (mx.float32, mx.int32, mx.float16):
        x = mx.arange(16).astype(dtype)
        (out,) = kernel(
            inputs=[x], output_shapes=[(16,)], output_dtypes=[dtype], grid=(16, 1, 1), threadgroup=(16, 1, 1)
        )
        assert mx.array_equal(out, x)


def test_finding_names_the_body_s_input() -> None:
    with pytest.raises(
        emulator.EmulatorError, match=r"reads 4 bytes of in0 at byte 256, 4 bytes beyond its 256"
    ):
        run("uint i = thread_position_in_grid.x; out[i] = in0[i + 1];", [mx.zeros(64)], mode="check")


def test_compile_error_shows_the_body_s_line() -> None:
    with pytest.raises(emulator.CompileError) as caught:
        run("uint i = thread_position_in_grid.x;\nout[i] = nothing;", [mx.zeros(64)])
    assert "out[i] = nothing;" in str(caught.value)


@pytest.mark.parametrize("transform", ["compile", "vmap", "grad", "jvp"])
def test_refused_in_transformations(transform: str) -> None:
    def f(x: mx.array) -> mx.array:
        return run(COPY, [x])

    x = mx.ones(64)
    call: dict[str, Callable[[], Any]] = {
        "compile": lambda: mx.compile(f)(x),
        "vmap": lambda: mx.vmap(f)(mx.ones((2, 64))),
        "grad": lambda: mx.grad(lambda y: f(y).sum())(x),
        "jvp": lambda: mx.jvp(f, [x], [x]),
    }
    with pytest.raises((RuntimeError, ValueError), match=r"\[metal_kernel\] an emulated kernel is eager"):
        mx.eval(call[transform]())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": []}, "Expected `inputs` to have size 1 but got size 0"),
        ({"output_shapes": []}, "Expected `output_shapes` to have size 1 but got size 0"),
        ({"output_dtypes": []}, "Expected `output_dtypes` to have size 1 but got size 0"),
        ({"template": [("T", 1.5)]}, "Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`"),
        ({"template": [("T", "x")]}, "Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`"),
        (
            {"template": [("T", 2**40)]},
            "Invalid template argument. Must be `mlx.core.Dtype`, `int` or `bool`",
        ),
        ({"inputs": [[1, 2]]}, "Invalid type list received in array initialization."),
        ({"inputs": ["x"]}, "Invalid type str received in array initialization."),
    ],
)
@pytest.mark.parametrize("module", MODULES, ids=["mlx", "emulator"])
def test_bad_calls_are_refused_as_mlx_refuses_them(module: Any, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        module.metal_kernel("probe", ["in0"], ["out"], COPY)(**CALL | change)


@pytest.mark.parametrize("module", MODULES, ids=["mlx", "emulator"])
@pytest.mark.parametrize(
    "change",
    [
        {"grid": (64, 1)},
        {"grid": (64.0, 1, 1)},
        {"grid": "abc"},
        {"threadgroup": (64,)},
        {"template": {"T": 1}},
        {"template": [("T", 1, 2)]},
        {"unknown": 1},
    ],
    ids=str,
)
def test_calls_of_wrong_types_are_refused_as_by_mlx(module: Any, change: dict[str, Any]) -> None:
    with pytest.raises(TypeError):
        module.metal_kernel("probe", ["in0"], ["out"], COPY)(**CALL | change)


@pytest.mark.parametrize("module", MODULES, ids=["mlx", "emulator"])
def test_names_must_be_a_sequence_of_names(module: Any) -> None:
    with pytest.raises(TypeError):
        module.metal_kernel("probe", "in0", ["out"], COPY)
    with pytest.raises(ValueError, match="Must specify at least one output"):
        module.metal_kernel("probe", ["in0"], [], COPY)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dtypes": [mx.float64]}, "dtypes must be ones that Metal has"),
        # MLX counts the threads that are asked for, not those that are left in a smaller grid.
        ({"threadgroup": (2048, 1, 1)}, "Thread group size (2048) is greater than"),
        ({"threadgroup": (64, 32, 1)}, "Thread group size (2048) is greater than"),
    ],
)
def test_calls_that_a_gpu_refuses(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        emulator.metal_kernel("probe", ["in0"], ["out"], COPY)(**CALL | change)


@pytest.mark.parametrize("options", [{"math_mode": "wild"}, {"speed": "high"}, 3], ids=str)
def test_bad_compile_options(options: Any) -> None:
    for module in MODULES:
        with pytest.raises(ValueError, match="metal_kernel"):
            module.metal_kernel("probe", [], ["out"], COPY, compile_options=options)


def test_fast_math_is_accepted() -> None:
    kernel = emulator.metal_kernel("probe", ["in0"], ["out"], COPY, compile_options={"math_mode": "fast"})
    assert kernel.name == "probe"


def test_results_are_those_of_numpy() -> None:
    x = mx.random.normal((64,))
    np.testing.assert_array_equal(
        np.array(run(COPY.replace("in0[i]", "in0[i] * 2 + 1"), [x])), np.array(x) * 2 + 1
    )
