"""The check of the kernels on a GPU, and what becomes of its verdict."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from metal import emulated, needs_emulator

from moefast import QuantSpec, RouterSpec, doctor
from moefast.backends import metal
from moefast.backends.metal import refusals, selfcheck, verdicts
from moefast.backends.metal.selfcheck import Comparison, Report
from moefast.registry import Problem

pytestmark = needs_emulator

ROUTER = RouterSpec(num_experts=8, top_k=2)


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where verdicts are kept during the test."""
    monkeypatch.setattr(verdicts, "cache_folder", lambda part: tmp_path / part)
    verdicts.stored.cache_clear()
    yield tmp_path / "metal" / "verdicts.json"
    verdicts.stored.cache_clear()


def comparison(part: str = "decode", **changes: Any) -> Comparison:
    agrees = Comparison(part, "a name", 0.0, 1.0, 0, 10, exact=True)
    return agrees._replace(**changes)


def test_the_kernels_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the reference is MLX's CPU, so bits are not compared."""
    monkeypatch.setattr(selfcheck, "_PACKINGS", (QuantSpec(bits=4), None))
    with emulated(check=False) as launches:
        report = selfcheck.check()
    assert report.failed == {}
    assert {made.name for made in launches} >= {"route", "gate_up", "down_combine", "plan", "combine"}
    assert {c.part for c in report.comparisons} == set(verdicts.PARTS)
    assert report.verdict()["checked"] == 4 + 5 * 2 * 2


def test_a_kernel_that_does_not_compile_fails_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_PACKINGS", (None,))

    def refuse(*_: Any) -> Any:
        raise RuntimeError("[metal::Device] Unable to build metal library from source")

    monkeypatch.setattr(metal.band, "gate_up", refuse)
    with emulated(check=False):
        report = selfcheck.check()
    assert set(report.failed) == {"band", "band-fast"}
    assert "Unable to build metal library" in report.failed["band"]


def test_a_kernel_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selfcheck, "_PACKINGS", (None,))
    right = metal.decode.down_combine
    monkeypatch.setattr(metal.decode, "down_combine", lambda *args, **kw: 1.05 * right(*args, **kw))
    with emulated(check=False):
        report = selfcheck.check()
    assert set(report.failed) == {"decode", "decode-fast"}
    assert "exceeds" in report.failed["decode"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"error": 1.5}, "a name: error 1.5 exceeds 1"),
        ({"error": float("nan")}, "a name: error nan exceeds 1"),
        ({"different": 3}, "a name: 3 of 10 results are not MLX's"),
        ({"different": 3, "exact": False}, None),
    ],
)
def test_what_counts_as_wrong(changes: dict[str, Any], reason: str | None) -> None:
    assert comparison(**changes).reason == reason


def test_a_verdict_disables_the_part_it_is_about(kept: Path) -> None:
    verdicts.store(Report((comparison(different=3), comparison("band"))).verdict())
    assert verdicts.reason_against("band") is None
    reason = "self-check: a name: 3 of 10 results are not MLX's (moefast doctor)"
    assert verdicts.reason_against("decode") == reason

    def why_not(op: str, phase: str) -> str | None:
        return refusals._verdict(Problem(op, "gpu", mx.float32, phase, (ROUTER, None, None)))

    assert why_not("experts", "decode") == why_not("moe", "decode") == reason
    fast = Problem("experts", "gpu", mx.float32, "decode", (ROUTER, None, None))
    assert refusals._verdict(fast, "fast") is None
    assert why_not("experts", "band") is why_not("moe", "prefill") is why_not("route", "decode") is None
    with emulated():
        assert why_not("experts", "decode") is None


def test_a_router_that_failed_takes_the_block_with_it(kept: Path) -> None:
    verdicts.store(Report((comparison("route", error=2.0),)).verdict())
    for op, refused in (("route", True), ("moe", True), ("experts", False)):
        problem = Problem(op, "gpu", mx.float32, "prefill", (ROUTER, None, None))
        assert (refusals._verdict(problem) is not None) == refused


def test_verdicts_are_of_one_release(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    verdicts.store({"failed": {"decode": "old"}})
    monkeypatch.setattr(verdicts, "identity", lambda: "another MLX")
    verdicts.stored.cache_clear()
    assert verdicts.stored() is None
    verdicts.store({"failed": {}})
    assert len(json.loads(kept.read_text())) == 2


def test_nothing_runs_unchecked(kept: Path) -> None:
    assert "run `moefast doctor` once" in (verdicts.reason_against("decode") or "")
    verdicts.store({"failed": {}})
    assert [verdicts.reason_against(part) for part in verdicts.PARTS] == [None] * len(verdicts.PARTS)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "{}"])
def test_a_broken_file_is_none(content: str, kept: Path) -> None:
    kept.parent.mkdir()
    kept.write_text(content)
    assert verdicts.stored() is None
    verdicts.store({"failed": {}})
    assert verdicts.stored() == {"failed": {}}


def test_doctor_checks_once_and_tells(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine that has a GPU."""
    monkeypatch.setitem(metal.METAL.__dict__, "unavailable", None)
    checked = []

    def check() -> Report:
        checked.append(1)
        return Report((comparison(different=3), comparison("route")))

    monkeypatch.setattr(selfcheck, "check", check)
    for _ in range(2):
        found = doctor.examine()
        assert found["metal"]["failed"] == {"decode": "a name: 3 of 10 results are not MLX's"}
        assert "not decode" in doctor.as_text(found)
    assert len(checked) == 1


def test_without_a_gpu_there_is_nothing_to_tell(kept: Path) -> None:
    if not mx.metal.is_available():
        assert metal.describe() == {}
    with emulated():
        assert metal.describe() == {}
