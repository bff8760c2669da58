"""Which binding of the kernels the native backend finds, what it obeys and tells, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest
from marks import needs_native

from moefast import doctor
from moefast.backends.native import loading

pytestmark = needs_native

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])} | environment,
        capture_output=True,
        text=True,
        timeout=110,
    )


DIGEST = """
import hashlib, mlx.core as mx, numpy as np
from moefast import *
from moefast.backends import native
from moefast.ops import attention
mx.set_default_device(mx.cpu)
mx.random.seed(0)
digest = hashlib.sha256()
quant = QuantSpec(group_size=32)
def stack(*shape, dtype):
    weight = (mx.random.normal(shape) * shape[-1] ** -0.5).astype(dtype)
    return Projection(*mx.quantize(weight, **quant.mlx_arguments()), quant=quant)
spec = RouterSpec(num_experts=8, top_k=3, renormalize=True)
for dtype in (mx.float32, mx.float16, mx.bfloat16):
    weights = ExpertWeights(up=stack(8, 96, 64, dtype=dtype), gate=stack(8, 96, 64, dtype=dtype),
                            down=stack(8, 64, 96, dtype=dtype))
    for tokens in (1, 5, 150):
        x, logits = mx.random.normal((tokens, 64)).astype(dtype), mx.random.normal((tokens, 8))
        heads = mx.random.normal((3, 2, 4, tokens, 32)).astype(dtype)
        indices, mix = route(logits, spec, backend="native")
        for y in (
            moe(x, logits, spec, weights, backend="native"),
            switch_glu(x, weights, indices, backend="native"),
            quantized_matmul(x, stack(200, 64, dtype=dtype), backend="native"),
            attention(*heads, scale=0.2, causal=True, backend="native"),
            mix,
        ):
            digest.update(np.array(y.astype(mx.float32)).tobytes())
found = native.describe()
print(found["isa"], found["threads"], digest.hexdigest())
"""


@pytest.mark.parametrize("isa", loading.bindings().native.isas() if loading.bindings().native else [])
def test_settings_are_obeyed_and_threads_change_nothing(isa: str) -> None:
    answers = []
    for threads in ("1", "3"):
        done = run(DIGEST, MOEFAST_ISA=isa, MOEFAST_THREADS=threads)
        assert done.returncode == 0, done.stderr
        named, counted, digest = done.stdout.split()
        assert (named, counted) == (isa, threads)
        answers.append(digest)
    assert len(set(answers)) == 1


def test_an_instruction_set_that_does_not_run_here_is_a_reason() -> None:
    program = "import moefast; print(moefast.backends()['native'])"
    absent = next(isa for isa in ("neon", "amx", "avx512") if isa not in kernels_isas())
    done = run(program, MOEFAST_ISA=absent)
    assert f"[engine] isa must be one that runs here ({', '.join(kernels_isas())}), got '{absent}'." in (
        done.stdout
    )


def kernels_isas() -> list[str]:
    found = loading.bindings()
    names: list[str] = (found.native or found.kernels).isas()
    return names


def test_doctor_tells_what_runs() -> None:
    found = doctor.examine()["native"]
    assert json.loads(json.dumps(found)) == found
    assert found["isa"] in found["isas"]
    assert found["threads"] >= 1
    assert "runs through" in doctor.as_text(doctor.examine())


OTHER_MLX = """
import sys, types, warnings
import moefast._build_info as info
info.BUILT_FOR_MLX = "0.31.0"
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import moefast
    from moefast.testing import assert_close, float64
    assert moefast.backends()["native"] is None, moefast.backends()
    import mlx.core as mx
    from moefast.ops import attention
    mx.set_default_device(mx.cpu)
    mx.random.seed(0)
    quant, spec = moefast.QuantSpec(group_size=32), moefast.RouterSpec(num_experts=4, top_k=2)

    def stack(*shape):
        return moefast.Projection(*mx.quantize(mx.random.normal(shape), **quant.mlx_arguments()), quant=quant)

    gate, up, down = stack(4, 96, 64), stack(4, 96, 64), stack(4, 64, 96)
    weights, dense = moefast.ExpertWeights(gate=gate, up=up, down=down), stack(48, 64)
    x, logits, heads = mx.random.normal((7, 64)), mx.random.normal((7, 4)), mx.random.normal((3, 1, 2, 7, 16))
    indices, mix = moefast.route(logits, spec, backend="reference")
    for run in (
        lambda b: moefast.moe(x, logits, spec, weights, backend=b),
        lambda b: moefast.experts(x, weights, moefast.Routing(indices, mix), backend=b),
        lambda b: moefast.switch_glu(x, weights, indices, backend=b),
        lambda b: moefast.quantized_matmul(x, dense, backend=b),
        lambda b: moefast.route(logits, spec, backend=b).weights.sum(axis=-1),
        lambda b: attention(*heads, scale=0.25, causal=True, backend=b),
    ):
        got, want = run("native"), run("reference")
        assert_close(got.reshape(1, -1), float64(want).reshape(1, -1), "moe", reductions=(64, 96), top_k=2)
assert "moefast._native" not in sys.modules, "it may end the process"
print(len(caught), caught[0].message)
"""


def test_another_mlx_gets_the_kernels_through_numpy_and_one_warning() -> None:
    """The results are right, too."""
    done = run(OTHER_MLX)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("1 moefast's CPU kernels run through NumPy")
    assert f"built for MLX 0.31.0, and this is MLX {mx.__version__}" in done.stdout
    assert "pip install mlx==0.31.0, or rebuild: pip install --no-build-isolation" in done.stdout


NOTHING_BUILT = """
import sys
import moefast._build_info as info
info.NO_NATIVE = info.NO_KERNELS = "no C++ compiler was found"
import moefast
print(moefast.backends()["native"])
import mlx.core as mx
print(moefast.quantized_matmul(mx.ones((1, 4)), moefast.Projection(mx.ones((3, 4)))).tolist())
"""


def test_without_a_compiler_the_reference_runs_and_the_reason_is_known() -> None:
    done = run(NOTHING_BUILT)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    reason, answer = done.stdout.splitlines()
    assert reason.startswith("moefast._native was not built (no C++ compiler was found)")
    assert answer == "[[4.0, 4.0, 4.0]]"


FORK = """
import multiprocessing, sys
import mlx.core as mx
import moefast
from moefast import Projection, quantized_matmul

mx.set_default_device(mx.cpu)

def child(answers):
    y = quantized_matmul(mx.ones((3, 64)), Projection(mx.ones((32, 64))), backend="native")
    answers.put(y.tolist())

if __name__ == "__main__":
    assert moefast.backends()["native"] is None  # loaded, and probed
    context = multiprocessing.get_context(sys.argv[1])
    answers = context.Queue()
    process = context.Process(target=child, args=(answers,))
    process.start()
    print(answers.get(timeout=60) == [[64.0] * 32] * 3)
    process.join()
"""


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_multiprocessing(method: str, tmp_path: Path) -> None:
    """By fork alone it does not work, and cannot: MLX's own stream threads do not survive one."""
    program = tmp_path / "program.py"
    program.write_text(FORK)
    done = subprocess.run(
        [sys.executable, str(program), method],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.stdout == "True\n", done.stderr
