"""The benchmark's verification, its facts about models and machine, and one tiny real run.

Statistics and planning are in test_bench_plan.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from moefast.backends import registry
from moefast.backends.reference import REFERENCE
from moefast.lm.bench import cli, machine, report
from moefast.lm.bench.bandwidth import measure_bandwidth, reader
from moefast.lm.bench.measure import PHASES
from moefast.lm.bench.models import build, bytes_per_token, draw_weights, parameters_of
from moefast.lm.bench.subjects import Verdict, judge
from moefast.lm.bench.truth import Outcome, Prompt, hooked_routers
from moefast.lm.presets import preset
from moefast.nn import MoE
from moefast.registry import Backend, Kernel
from moefast.testing import Error, logits_bound

ROOT = Path(__file__).resolve().parents[1]
BOUND = logits_bound("float32", layers=2, hidden=64)


# -- verification ------------------------------------------------------------------------------------------

HIDDEN = mx.random.normal((4, 64), key=mx.random.key(1))
LOGITS = mx.random.normal((1, 4, 8), key=mx.random.key(2))
WANT = Outcome(HIDDEN, [LOGITS])


def test_judge_passes_what_is_equal_and_says_how_many_tokens_that_was() -> None:
    assert judge(WANT, WANT, BOUND) == Verdict(Error(0.0, 0.0), BOUND, passed=True, tokens=4)


def test_judge_fails_on_wrong_router_logits() -> None:
    assert not judge(Outcome(HIDDEN, [LOGITS * 1.5]), WANT, BOUND).passed


def test_judge_compares_the_tokens_that_both_ran_and_wants_numbers_of_the_others() -> None:
    more = mx.concatenate([HIDDEN, HIDDEN * 9])
    logits = mx.concatenate([LOGITS, LOGITS], axis=1)
    verdict = judge(Outcome(more, [logits]), WANT, BOUND)
    assert (verdict.passed, verdict.tokens) == (True, 4)
    more[6] = mx.nan
    assert not judge(Outcome(more, [logits]), WANT, BOUND).passed
    assert judge(Outcome(HIDDEN[:2], [LOGITS[:, :2]]), WANT, BOUND).tokens == 2


def test_judge_fails_on_nan() -> None:
    assert not judge(Outcome(HIDDEN * mx.nan, []), WANT, BOUND).passed


def test_judge_only_reports_without_a_bound() -> None:
    verdict = judge(Outcome(HIDDEN * 1.5, []), WANT, None)
    assert verdict.passed
    assert verdict.error.rms == pytest.approx(0.5)


@pytest.mark.parametrize("family", ["granitemoe", "glm4_moe", "qwen2_moe"])  # linear, raw, linear as router
def test_router_logits_can_be_seen_and_replaced(family: str) -> None:
    model = build(preset(family, "tiny"), 4)
    draw_weights(model, seed=0)
    tokens = mx.arange(4)[None]
    plain = model(tokens)
    seen: list[tuple[int, ...]] = []

    def hook(i: int, logits: mx.array) -> mx.array:
        assert i == len(seen)
        seen.append(logits.shape)
        return -logits

    with hooked_routers(model, hook):
        replaced = model(tokens)
    blocks = [m for m in model.modules() if isinstance(m, MoE)]
    assert seen == [(1, 4, block.spec.num_experts) for block in blocks]
    assert not mx.array_equal(plain, replaced)
    assert mx.array_equal(plain, model(tokens))  # and put back


# -- models, prompts, machine ------------------------------------------------------------------------------


def test_prompts_are_seeded_and_spread() -> None:
    a, b = (Prompt.draw(512, 64, 8, seed=3) for _ in range(2))
    assert mx.array_equal(a.prefill, b.prefill)
    assert np.unique(np.asarray(a.prefill)).size > 32
    assert not mx.array_equal(a.prefill, Prompt.draw(512, 64, 8, seed=4).prefill)


@pytest.mark.parametrize("family", ["granitemoe", "dbrx"])  # a tied embedding is read as the head
def test_bytes_per_token_count_the_chosen_experts_only(family: str) -> None:
    model = build(preset(family, "tiny"), 4)
    parameters = parameters_of(model)
    stacks = sum(a.nbytes for path, a in parameters if a.ndim == 3)
    embedding = sum(a.nbytes for path, a in parameters if ".wte." in path)
    chosen = {"granitemoe": 2 / 8, "dbrx": 2 / 8}[family]
    total = sum(a.nbytes for _, a in parameters)
    assert bytes_per_token(model) == total - embedding - stacks + stacks * chosen


def test_git_state_is_of_this_checkout_or_nothing(tmp_path: Path) -> None:
    assert machine.git_state(tmp_path) is None
    assert machine.git_state(ROOT / "moefast") is None  # inside a checkout, but not its top
    state = machine.git_state(ROOT)
    assert state is None or (len(state["commit"]) == 40 and isinstance(state["dirty"], bool))


def test_bandwidth_is_measured_with_one_thread_and_two() -> None:
    bandwidth = measure_bandwidth(1 << 20)
    if mx.default_device().type == mx.DeviceType.cpu:
        assert {"copy, 1 thread", "read, 1 thread", "copy, 2 threads", "read, 2 threads"} <= set(
            bandwidth.figures
        )
    assert 0 < bandwidth.roof < math.inf


def test_a_reading_is_made_with_the_native_backends_threads() -> None:
    read = reader(1 << 20)
    built = importlib.util.find_spec("moefast._kernels") is not None
    assert (read is not None) == (built and mx.default_device().type == mx.DeviceType.cpu)
    if read is not None:
        assert 0.01 < read() < math.inf


@pytest.mark.parametrize(
    ("value", "text"), [(0.05234, "0.0523"), (1.5, "1.50"), (19.74, "19.7"), (100.4, "100"), (5120.0, "5120")]
)
def test_numbers_have_three_digits(value: float, text: str) -> None:
    assert report.number(value) == text


# -- the command -------------------------------------------------------------------------------------------

TINY = [
    "--size",
    "tiny",
    "--prompt-tokens",
    "16",
    "--decode-tokens",
    "2",
    "--repeats",
    "2",
    "--budget",
    "600",
]  # ample: a busy machine must not leave anything out


@pytest.fixture(autouse=True)
def quick_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "measure_bandwidth", lambda: measure_bandwidth(1 << 20))


def run_tiny(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str], dict[str, Any]]:
    status = cli.main([*TINY, *arguments])
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar where nobody watches
    lines = captured.out.rstrip("\n").split("\n")
    return status, lines, json.loads(lines[-1])


def test_accelerated_models_of_mlx_lm_are_judged(capsys: pytest.CaptureFixture[str]) -> None:
    subjects = ["mlx-lm-fp32", "accelerated-bf16", "accelerated-fp32"]
    families = ["granitemoe", "dbrx"]
    status, _, result = run_tiny(capsys, "--families", *families, "--subjects", *subjects)
    assert status == 0
    for family in result["families"]:
        found = {s["subject"]: s for s in family["subjects"]}
        for label in subjects[1:]:
            assert found[label]["verified"]
            assert found[label]["judged"]
            assert found[label]["backend"] == "auto"
            assert found[label]["decode"]["points"]


def test_tiny_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    plot, written = tmp_path / "bench.png", tmp_path / "bench.json"
    status, lines, result = run_tiny(capsys, "--plot", str(plot), "--json", str(written))
    assert status == 0
    assert result["passed"]
    assert json.loads(written.read_text()) == result
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert {"cpu", "cores", "memory", "os", "device"} <= result["machine"].keys()
    assert {"python", "mlx", "mlx-lm", "moefast"} == result["versions"].keys()
    assert {"git", "date", "environment", "settings", "command", "bandwidth_gb_s"} <= result.keys()
    families = result["families"]
    assert [f["family"] for f in families] == ["granitemoe", "glm4_moe", "qwen2_moe", "bailing_moe", "dbrx"]
    for family in families:
        subjects = {s["subject"]: s for s in family["subjects"]}
        assert subjects.keys() >= {"mlx-lm-bf16", "mlx-lm-fp32", "reference"}
        for phase in PHASES:
            base = subjects[family["baseline"][phase]][phase]
            for subject in subjects.values():
                assert subject["verified"]
                assert subject["peak_bytes"] > 0
                points = {point["tokens"]: point for point in subject[phase]["points"]}
                assert all(p["low"] <= p["median"] <= p["high"] for p in points.values())
                assert all(len(p["seconds"]) == p["runs"] for p in points.values())
                against = subject[phase]["ratio"]
                same = next(p for p in base["points"] if p["tokens"] == against["tokens"])
                expected = points[against["tokens"]]["median"] / same["median"]
                assert against["times"] == pytest.approx(expected, rel=1e-4)
    text = "\n".join(lines)
    assert "dbrx: 2 layers" in text
    assert f"to repeat: {result['command']}" in text


def test_command_repeats_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser("moefast bench")
    cli.add_arguments(parser)
    given = parser.parse_args(["--families", "dbrx", "--layers", "3", "--seed", "7", "--budget", "12.5"])
    command = shlex.split(cli.repro(given))
    assert command[:2] == ["moefast", "bench"]
    assert parser.parse_args(command[2:]) == given


def test_wrong_backend_fails_the_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(*arguments: Any) -> mx.array:
        y: mx.array = REFERENCE.kernels["moe"].run(*arguments)
        return y * 1.5

    broken = Backend("broken", {**REFERENCE.kernels, "moe": Kernel(wrong)})
    monkeypatch.setattr(registry, "backends", (broken, *registry.backends))
    monkeypatch.setattr(registry, "_choices", {})
    status, lines, result = run_tiny(capsys, "--families", "qwen2_moe", "--subjects", "mlx-lm-fp32", "broken")
    assert status == 1
    assert not result["passed"]
    subjects = {s["subject"]: s for s in result["families"][0]["subjects"]}
    assert (subjects["mlx-lm-fp32"]["verified"], subjects["broken"]["verified"]) == (True, False)
    assert subjects["broken"]["decode"]["points"] == []
    assert any("WRONG: qwen2_moe, broken bf16" in line for line in lines)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--families", "llama"],
        ["--subjects", "cuda"],
        ["--repeats", "0"],
        ["--budget", "-1"],
        ["--bits", "7"],
    ],
)
def test_bad_arguments_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_output_that_could_not_be_written_is_refused_before_measuring(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert cli.main([*TINY, "--json", str(tmp_path / "missing" / "a.json")]) == 2
    assert "must be a directory that exists" in capsys.readouterr().err
    monkeypatch.setattr(cli, "find_spec", lambda name: None)
    assert cli.main([*TINY, "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install '.[bench]'" in capsys.readouterr().err
    assert cli.main([*TINY, "--plot", str(tmp_path / "a.pdf")]) == 2
    assert "must end in .png" in capsys.readouterr().err


def test_script_prints_help_with_examples() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "tokens.py", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "python benchmarks/tokens.py --families qwen2_moe dbrx" in done.stdout


def test_ops_benchmark_runs_a_case_and_prints_its_table() -> None:
    pytest.importorskip("pytest_benchmark")
    case = "test_quantized_matmul and granitemoe-1-reference"
    # A parallel run of this suite marks its environment, and pytest-benchmark then times nothing.
    environment = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/ops.py", "-q", "-k", case, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
    assert "vs faster" in done.stdout
