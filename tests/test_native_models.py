"""Whole models on the native backend, on every instruction set and through either binding.

test_models_parity.py compares the models with mlx-lm's and with float32 on every backend; here those of its
tests that run the native one are run again in processes set up otherwise.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from marks import needs_native
from model_cases import FULL

import moefast
from moefast.backends.native import loading

pytestmark = [needs_native, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[1]

PARITY = """
import sys
import pytest
from moefast.backends import native
code = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1].split()])
found = native.describe()
print("ran on", found["isa"], "through", found["runs through"])
sys.exit(code)
"""


def run(program: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": paths} | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )


def parity(**environment: str) -> str:
    """What pytest says of every family's tests in 4 bits: text and logits in float32, logits in bfloat16."""
    file = "tests/test_models_parity.py"
    names = [f"{file}::test_logits_and_greedy_text[native-{case}-4bit]" for case in FULL]
    names += [f"{file}::test_half_precision[native-{case}-mlx.core.bfloat16-4bit]" for case in FULL]
    done = run(PARITY, " ".join(names), **environment)
    assert re.search(rf"^{len(names)} passed", done.stdout, re.MULTILINE), done.stdout + done.stderr
    return done.stdout


def other_isas() -> list[str]:
    """Those that this process does not run on."""
    found = loading.bindings()
    running = loading.describe().get("isa")
    return [isa for isa in (found.native or found.kernels).isas() if isa != running]


@pytest.mark.parametrize("isa", other_isas() if moefast.backends()["native"] is None else [])
def test_five_families_on_every_instruction_set(isa: str) -> None:
    assert f"ran on {isa} through MLX" in parity(MOEFAST_ISA=isa)


THROUGH_NUMPY = """
import moefast._build_info as info
info.BUILT_FOR_MLX = "0.31.0"
import mlx.core as mx
from model_builders import ours, prefill_and_decode, tokens
from model_cases import FULL, sizes
from moefast import use_backend
from moefast.backends import native, registry
from moefast.testing import assert_logits_close

mx.set_default_device(mx.cpu)
assert native.bindings().native is None
for case in FULL:
    for bits in (None, 4):
        model = ours(case.config, bits=bits)
        prompt, continuation = tokens(2, 40), tokens(2, 8, seed=2)
        got = prefill_and_decode(model, prompt, continuation)
        ran = {p.op for p, choice in registry.choices() if choice.backend == "native"}
        with use_backend("reference"):
            want = prefill_and_decode(model, prompt, continuation)
        assert_logits_close(got, want, **sizes(case.config))
print(*sorted(ran))
"""


def test_five_families_through_numpy() -> None:
    """Where the primitives do not fit MLX; what has no kernel there is the reference's."""
    done = run(THROUGH_NUMPY, MOEFAST_BACKEND="auto")
    assert done.returncode == 0, done.stderr
    assert {"moe", "quantized_matmul"} <= set(done.stdout.split())
