"""What ``moefast doctor`` finds, and that it needs nothing but moefast."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moefast import doctor
from moefast.backends import registry
from moefast.cli import main
from moefast.paths import kernels_dir
from moefast.registry import Backend, Kernel, Problem

ROOT = Path(__file__).resolve().parents[1]
OPS = {"route", "switch_glu", "experts", "moe", "quantized_matmul"}


def test_findings_are_json() -> None:
    found = doctor.examine()
    assert json.loads(json.dumps(found)) == found
    assert {"python", "moefast", "mlx", "mlx-lm", "numpy"} <= found["versions"].keys()
    assert found["platform"]["memory_bytes"] > 1 << 30
    assert found["kernels"] == str(kernels_dir())
    assert found["backends"]["reference"] is None


def test_every_operation_and_phase_has_a_choice() -> None:
    auto = doctor.examine()["auto"]
    assert auto.keys() == OPS
    assert all(by_phase.keys() == {"decode", "band", "prefill"} for by_phase in auto.values())
    assert all(choice["backend"] for by_phase in auto.values() for choice in by_phase.values())


def test_every_variable_is_listed_with_its_value() -> None:
    from moefast.env import Settings

    found = doctor.examine()["environment"]
    assert len(found) == len(Settings.__dataclass_fields__)
    assert found["MOEFAST_LOG"] == {"value": False, "default": True}
    assert found["MOEFAST"] == {"value": True, "default": True}


def test_examining_is_not_using() -> None:
    before = registry.choices()
    doctor.examine()
    assert registry.choices() == before


def only_moe(problem: Problem) -> str | None:
    return None if problem.phase == "decode" else "decode only"


@pytest.fixture
def two_more(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the reference: a backend that cannot run here, and one for some of the problems."""
    absent = Backend("absent", {}, probe=lambda: "no such chip")
    partial = Backend("partial", {"moe": Kernel(print, only_moe)})
    monkeypatch.setattr(registry, "backends", (absent, partial, *registry.backends))


@pytest.mark.usefixtures("two_more")
def test_reasons_are_given() -> None:
    found = doctor.examine()
    assert found["backends"]["absent"] == "no such chip"
    assert found["auto"]["moe"]["decode"] == {"backend": "partial", "refused": {"absent": "no such chip"}}
    assert found["auto"]["moe"]["band"]["refused"]["partial"] == "decode only"
    text = doctor.as_text(found)
    assert re.search(r"absent +no such chip", text)
    assert "moe: not partial: decode only" in text
    assert "not absent" not in text  # said once, above


@pytest.mark.usefixtures("two_more")
def test_a_named_default_is_all_there_is() -> None:
    former = registry.set_default("partial")
    try:
        found = doctor.examine()
    finally:
        registry.set_default(former)
    assert found["auto"]["route"]["decode"] == {"backend": None, "refused": {"partial": "no route kernel"}}
    assert "backend='partial' picks" in doctor.as_text(found)


def test_missing_kernels_are_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("moefast.paths.__file__", str(tmp_path / "moefast" / "paths.py"))
    assert doctor.examine()["kernels"].startswith("[kernels_dir] Metal sources must be installed")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_command(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *flags]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert (json.loads(out) if flags else {"auto": OPS})["auto"]
    assert all(op in out for op in OPS)


WITHOUT_EXTRAS = """
import sys
for name in ("mlx_lm", "transformers", "safetensors", "rich", "tokenizers", "huggingface_hub"):
    sys.modules[name] = None  # importing it fails
from moefast.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_needs_no_extra(flags: list[str]) -> None:
    command = [sys.executable, "-c", WITHOUT_EXTRAS, "doctor", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "quantized_matmul" in done.stdout


def test_it_reports_a_wrong_backend_instead_of_failing_on_it() -> None:
    environment = {**os.environ, "MOEFAST_BACKEND": "bogus"}
    command = [sys.executable, "-m", "moefast", "doctor"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "MOEFAST_BACKEND must be one of" in done.stdout
