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
from model_cases import FULL

import moefast
from moefast.backends.native import loading

pytestmark = pytest.mark.skipif(
    moefast.backends()["native"] is not None, reason=f"native: {moefast.backends()['native']}"
)

ROOT = Path(__file__).resolve().parents[1]

PARITY = """
import sys
import moefast._build_info as info
import pytest
if "numpy" in sys.argv:
    info.BUILT_FOR_MLX = "0.31.0"
from moefast.backends import native
code = pytest.main(["-q", "-p", "no:cacheprovider", *sys.argv[1].split()])
found = native.describe()
print("ran on", found["isa"], "through", found["runs through"])
sys.exit(code)
"""


def parity(*arguments: str, **environment: str) -> str:
    """What pytest says of every family's tests in 4 bits: text and logits in float32, logits in bfloat16."""
    file = "tests/test_models_parity.py"
    names = [f"{file}::test_logits_and_greedy_text[native-{case}-4bit]" for case in FULL]
    names += [f"{file}::test_half_precision[native-{case}-mlx.core.bfloat16-4bit]" for case in FULL]
    done = subprocess.run(
        [sys.executable, "-c", PARITY, " ".join(names), *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=115,
    )
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


def test_five_families_through_numpy() -> None:
    assert "through NumPy: moefast._native was built for MLX 0.31.0" in parity("numpy")
