"""``moefast tune``: what is measured, how it is decided, kept and obeyed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import moefast
from moefast import tuning
from moefast.backends import native
from moefast.backends.metal import dispatch
from moefast.cli import main

pytest.importorskip("mlx_lm", reason="tunes models of mlx-lm")

from mlx_lm.utils import load_model

from moefast.acceleration.swap import original_of
from moefast.lm import init_model
from moefast.lm.tune import TOKENS, Kind, as_stored, kinds_of, stopwatch, tune
from moefast.lm.tune_machine import best_thresholds, fastest_threads

needs_native = pytest.mark.skipif(
    moefast.backends()["native"] is not None, reason="no native build: nothing to choose from"
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(tuning, "cache_folder", lambda part: tmp_path / part)
    tuning.stored.cache_clear()
    yield tmp_path
    tuning.stored.cache_clear()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tuning") / "tiny"
    init_model("qwen2_moe", folder, size="tiny", dtype="float32")
    return folder


@pytest.fixture
def model(checkpoint: Path) -> Any:
    loaded, _ = load_model(checkpoint)
    return loaded.eval()


def blocks(model: Any) -> list[Any]:
    return [layer.mlp for layer in model.model.layers]


def measured(model: Any, seconds: Callable[[bool, str], float]) -> list[Kind]:
    """Tune with a stopwatch that runs nothing: ``seconds(accelerated?, phase)``."""
    modules = [module for _, module in model.named_modules()]
    phases: list[str] = []

    def watch(run: Callable[[], mx.array]) -> float:
        y = run()
        tokens = y.shape[-2]
        phases.append({1: "decode", 16: "band", 128: "prefill"}[tokens])
        accelerated = any(original_of(module) is not None for module in modules)
        return tokens * seconds(accelerated, phases[-1])

    kinds = tune(model, seconds=0.01, watch=watch)
    assert set(phases) == {"decode", "band", "prefill"}
    assert all(original_of(module) is None for module in modules)
    return kinds


@needs_native
def test_every_kind_of_layer_once(model: Any) -> None:
    kinds = kinds_of(model)
    assert len({kind.key for kind in kinds}) == len(kinds)
    block = next(kind for kind in kinds if kind.layers[0].what == "block")
    assert [layer.module for layer in block.layers] == blocks(model)
    assert "experts 256 x 128" in block.what


@needs_native
def test_the_slower_side_is_not_chosen(model: Any) -> None:
    kinds = measured(model, lambda accelerated, phase: 2.0 if accelerated == (phase == "band") else 1.0)
    for kind in kinds:
        chosen = {phase: found["choice"] for phase, found in kind.decided().items()}
        assert chosen == {"decode": "native", "band": "original", "prefill": "native"}


@needs_native
def test_what_is_timed_has_been_called_before(model: Any) -> None:
    """As in generation, where every call but the first is one that the layer remembers."""
    modules = [module for _, module in model.named_modules()]
    remembered: list[bool] = []

    def watch(run: Callable[[], mx.array]) -> float:
        of_one = [m for m in modules if original_of(m) is not None and hasattr(m, "group_size")]
        if len(of_one) == 1 and original_of(of_one[0]).__name__ == "QuantizedLinear":
            remembered.append(of_one[0].__dict__.get("_recall") is not None)
        run()
        return 1.0

    tune(model, seconds=0.01, watch=watch)
    assert len(remembered) > 10
    assert all(remembered)


@needs_native
def test_what_was_measured_before_does_not_matter(model: Any) -> None:
    tuning.store(as_stored(measured(model, lambda accelerated, phase: 2.0 if accelerated else 1.0)))
    modules = [module for _, module in model.named_modules()]
    most = 0

    def watch(run: Callable[[], mx.array]) -> float:
        nonlocal most
        most = max(most, sum(original_of(module) is not None for module in modules))
        run()
        return 1.0

    tune(model, seconds=0.01, watch=watch)
    assert most > 5  # a block, its experts, its router and the layers of its shared expert


@needs_native
def test_an_original_that_would_take_minutes_is_not_run(model: Any) -> None:
    runs: list[bool] = []
    modules = [module for _, module in model.named_modules()]

    def watch(run: Callable[[], mx.array]) -> float:
        tokens = run().shape[-2]
        accelerated = any(original_of(module) is not None for module in modules)
        runs.append(accelerated)
        assert accelerated or tokens == 1, "the original ran on a prompt"
        return tokens * (0.001 if accelerated else 1.0)

    for kind in tune(model, seconds=0.01, watch=watch):
        decided = kind.decided()
        assert {phase: of["choice"] for phase, of in decided.items()} == dict.fromkeys(TOKENS, "native")
        assert decided["prefill"]["expected"] == 128.0
        assert set(decided["prefill"]["seconds"]) == {"native"}
    assert set(runs) == {True, False}


@needs_native
def test_layers_beside_the_experts_are_measured(model: Any) -> None:
    """Norms, rotations and attention: where the original is faster, they stay."""

    def seconds(accelerated: bool, phase: str) -> float:
        return 2.0 if accelerated == (phase == "decode") else 1.0

    kinds = measured(model, seconds)
    beside = {kind.layers[0].kind: kind for kind in kinds if kind.layers[0].what == "dense"}
    assert {"RMSNorm", "RoPE", "Attention"} <= beside.keys()
    for name in ("RMSNorm", "RoPE", "Attention"):
        found = {phase: of["choice"] for phase, of in beside[name].decided().items()}
        assert found == {"decode": "original", "band": "native", "prefill": "native"}
    tuning.store(as_stored(kinds))
    moefast.accelerate(model)
    attention, norm = model.model.layers[0].self_attn, model.model.norm
    x, heads = mx.random.normal((1, 1, 256)), mx.random.normal((1, 4, 1, 64))
    got = attention(x), norm(x), attention.rope(heads, offset=3)
    moefast.restore(model)
    for mine, theirs in zip(got, (attention(x), norm(x), attention.rope(heads, offset=3)), strict=True):
        assert mx.array_equal(mine, theirs)


@needs_native
@pytest.mark.slow
def test_real_runs_are_timed(model: Any) -> None:
    kinds = tune(model, seconds=0.01, watch=stopwatch)
    for kind in kinds:
        assert set(kind.seconds) == {"decode", "band", "prefill"}
        for sides in kind.seconds.values():
            assert set(sides) == {"original", "native"}
            assert all(took > 0 for runs in sides.values() for took in runs)


@needs_native
def test_auto_obeys(model: Any) -> None:
    ids = mx.array([[3, 1, 4, 1, 5]])
    plain = model(ids[:, :1])
    kinds = measured(model, lambda accelerated, phase: 2.0 if accelerated == (phase == "decode") else 1.0)
    tuning.store(as_stored(kinds))
    report = moefast.accelerate(model)
    phases = {"decode": "original", "band": "native", "prefill": "native"}
    assert [entry.backends for entry in report.accelerated] == [phases] * len(blocks(model))
    assert "decode original" in str(report)
    # With every layer of this phase as it was, the bits are, too; rope and norms apart.
    block = blocks(model)[0]
    x = mx.random.normal((1, 1, 256))
    got = block(x)
    moefast.restore(model)
    assert mx.array_equal(got, block(x))
    assert mx.allclose(plain, model(ids[:, :1]))


@needs_native
def test_a_layer_that_is_always_slower_is_left_alone(model: Any) -> None:
    kinds = measured(model, lambda accelerated, phase: 2.0 if accelerated else 1.0)
    tuning.store(as_stored(kinds))
    report = moefast.accelerate(model)
    assert not report.accelerated
    assert {entry.reason for entry in report.original} == {"moefast tune found the original faster"}
    assert all(original_of(block) is None for block in blocks(model))
    # Who asks for a backend by name gets it.
    assert moefast.accelerate(model, backend="native").accelerated


@needs_native
def test_other_sizes_are_not_decided(model: Any, tmp_path: Path) -> None:
    tuning.store(as_stored(measured(model, lambda accelerated, phase: 2.0 if accelerated else 1.0)))
    init_model("granitemoe", tmp_path / "other", size="tiny")
    other, _ = load_model(tmp_path / "other")
    assert moefast.accelerate(other).accelerated


def test_numbers_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "describe", lambda: {"threads": 8})
    took = {1: 8.0, 2: 4.0, 4: 2.0, 8: 3.0}
    asked: list[int] = []

    def run(threads: int, path: str, seconds: float) -> float:
        asked.append(threads)
        return took[threads]

    assert fastest_threads("model", 4.0, run) == (4, took)
    assert asked == [1, 2, 4, 8]
    took[4] = 2.9  # within what two processes differ by
    assert fastest_threads("model", 4.0, run)[0] == 0


def test_threads_are_used() -> None:
    from moefast.backends.native import loading

    assert loading.threads() == moefast.env.settings.threads
    tuning.store({"threads": 3})
    assert loading.threads() == (moefast.env.settings.threads or 3)


@needs_native
def test_thresholds_of_metal_kernels(model: Any) -> None:
    """As if merging were slower, and the band's kernels were best from 3 tokens on."""
    start = dispatch.Thresholds(band=2, tiles=16, by_mlx=None)
    seen: set[dispatch.Thresholds] = set()

    def watch(run: Callable[[], mx.array]) -> float:
        limits = dispatch.thresholds()
        seen.add(limits)
        return 1.0 + limits.merged + abs(limits.band - 3) + (limits.tiles != 32) + (limits.by_mlx is not None)

    best = best_thresholds(kinds_of(model), mx.float32, start, watch)
    assert best == dispatch.Thresholds(band=3, tiles=32, by_mlx=None)
    assert start._replace(merged=True) in seen
    assert dispatch.thresholds() not in seen - {start}


def test_tuned_thresholds_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    tuning.store({"metal_thresholds": {"band": 4, "tiles": 8, "by_mlx": None, "merged": True}})
    assert dispatch.thresholds() == dispatch.Thresholds(band=4, tiles=8, by_mlx=None, merged=True)
    assert dispatch.thresholds(0).band == 2  # of a generation
    monkeypatch.setattr(dispatch, "emulated", lambda: True)
    assert dispatch.thresholds() == dispatch.thresholds(0)


def test_what_is_stored_grows_and_is_forgotten() -> None:
    assert not tuning.clear()
    one = {"what": "one", "phases": {}}
    tuning.store({"when": "today", "threads": 2, "layers": {"a": one}})
    tuning.store({"when": "later", "layers": {"b": one}})
    assert tuning.stored() == {"when": "later", "threads": 2, "layers": {"a": one, "b": one}}
    kept = json.loads(tuning.file().read_text())
    tuning.file().write_text(json.dumps({**kept, "another machine": {"threads": 7}}))
    assert tuning.clear()
    assert tuning.stored() == {}
    assert json.loads(tuning.file().read_text()) == {"another machine": {"threads": 7}}


@pytest.mark.parametrize("content", ["", "[1]", "{]", '{"%s": 3}'])
def test_a_broken_file_decides_nothing(content: str, caplog: pytest.LogCaptureFixture) -> None:
    tuning.file().parent.mkdir(parents=True)
    tuning.file().write_text(content.replace("%s", tuning.identity()))
    tuning.stored.cache_clear()
    assert tuning.stored() == {}
    assert tuning.threads() == 0


@needs_native
def test_the_command(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune", "--model", str(checkpoint), "--budget", "0.1", "--no-threads", "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["identity"] == tuning.identity()
    assert found["layers"] == tuning.stored()["layers"]
    assert main(["tune", "--show"]) == 0
    shown = capsys.readouterr().out
    assert "Qwen2MoeSparseMoeBlock" in shown
    assert main(["tune", "--clear"]) == 0
    assert main(["tune", "--show"]) == 0
    assert "nothing is stored" in capsys.readouterr().out


@needs_native
@pytest.mark.slow
def test_threads_in_processes_of_their_own(checkpoint: Path) -> None:
    best, took = fastest_threads(str(checkpoint), 1.0)
    assert all(seconds > 0 for seconds in took.values())
    assert best in (0, *took)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model", "/nowhere/at/all"], "got"),
        (["--model", ".", "--budget", "0"], "[tune] --budget must be above 0 seconds"),
    ],
)
def test_refusals(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", *arguments]) == 2
    assert expected in capsys.readouterr().err
