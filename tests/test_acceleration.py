"""accelerate and restore: what goes on working with an accelerated model."""

from __future__ import annotations

import copy
import gc
import json
import pickle
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from marks import needs_native
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.cache import make_prompt_cache, trim_prompt_cache
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchGLU
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm_models import MODELS, Tiny, build, parameters, tokens

import moefast
from moefast import use_backend
from moefast.acceleration.checks import Verdict
from moefast.testing import assert_logits_close

pytestmark = pytest.mark.usefixtures("cpu")
BACKENDS = pytest.mark.parametrize("backend", [pytest.param("native", marks=needs_native), "reference"])
# A block, router and experts apart, experts alone, a list of experts.
SHAPES = pytest.mark.parametrize("module", ["glm4_moe", "gemma4_text", "phimoe", "dbrx"])


def tiny(module: str) -> Tiny:
    return next(t for t in MODELS if t.module == module)


def fresh(module: str = "glm4_moe", **how: Any) -> nn.Module:
    return build(tiny(module), **how)


def classes(model: nn.Module) -> list[type]:
    return [type(module) for _, module in model.named_modules()]


def close(got: mx.array, want: mx.array) -> None:
    assert_logits_close(got, want, layers=2, hidden=64)


@BACKENDS
@SHAPES
def test_twice_is_once(module: str, backend: str) -> None:
    model, text = fresh(module, bits=4), tokens(2, 9)
    want, kinds = model(text), classes(model)
    first = moefast.accelerate(model, backend=backend)
    once, swapped, names = model(text), classes(model), list(parameters(model))
    second = moefast.accelerate(model, backend=backend)
    assert second.entries == first.entries
    assert classes(model) == swapped
    assert list(parameters(model)) == names
    assert mx.array_equal(model(text), once).item()
    assert moefast.restore(model) > 0
    assert classes(model) == kinds
    assert mx.array_equal(model(text), want).item()
    assert moefast.restore(model) == 0
    assert classes(model) == kinds


@needs_native
@SHAPES
def test_another_backend_the_second_time(module: str) -> None:
    model, text = fresh(module), tokens(2, 9)
    want = model(text)
    moefast.accelerate(model, backend="native")
    close(model(text), want)
    report = moefast.accelerate(model, backend="reference")
    assert {b for e in report.accelerated for b in e.backends.values()} <= {"reference"}
    assert not report.dense
    close(model(text), want)


@BACKENDS
@SHAPES
def test_a_deep_copy_is_accelerated_and_apart(module: str, backend: str) -> None:
    model, text = fresh(module), tokens(2, 9)
    want = model(text)
    moefast.accelerate(model, backend=backend)
    fast = model(text)
    twin = copy.deepcopy(model)
    assert classes(twin) == classes(model)
    assert mx.array_equal(twin(text), fast).item()
    moefast.restore(model)
    assert mx.array_equal(model(text), want).item()
    assert mx.array_equal(twin(text), fast).item()
    moefast.restore(twin)
    assert classes(twin) == classes(model)
    assert mx.array_equal(twin(text), want).item()


@BACKENDS
@SHAPES
def test_it_survives_pickling(module: str, backend: str) -> None:
    model, text = fresh(module), tokens(2, 9)
    want = model(text)
    moefast.accelerate(model, backend=backend)
    fast = model(text)
    twin = pickle.loads(pickle.dumps(model))
    assert classes(twin) == classes(model)
    assert mx.array_equal(twin(text), fast).item()
    moefast.restore(twin)
    assert mx.array_equal(twin(text), want).item()


@BACKENDS
def test_a_compiled_caller(backend: str) -> None:
    model, text = fresh(bits=4), tokens(2, 9)
    want = model(text)

    def last(ids: mx.array) -> mx.array:
        return model(ids)[:, -1]

    with moefast.accelerated(model, backend=backend):
        fast = mx.compile(last)
        close(fast(text), want[:, -1])
        close(fast(text[:, :4]), model(text[:, :4])[:, -1])
    # What was traced stays what it was.
    close(fast(text), want[:, -1])
    close(mx.compile(lambda ids: last(ids))(text), want[:, -1])


@BACKENDS
@pytest.mark.parametrize("module", ["glm4_moe", "gemma4_text", "phimoe"])
def test_saved_weights_load_into_a_stock_model(module: str, backend: str, tmp_path: Path) -> None:
    model, text = fresh(module, bits=4), tokens(2, 9)
    want = model(text)
    moefast.accelerate(model, backend=backend)
    model(text)
    model.save_weights(str(tmp_path / "model.safetensors"))
    stock = build(tiny(module), bits=4, seed=1)
    stock.load_weights(str(tmp_path / "model.safetensors"), strict=True)
    assert mx.array_equal(stock(text), want).item()


@BACKENDS
def test_weights_loaded_later_count(backend: str) -> None:
    model, other, text = fresh(), fresh(seed=1), tokens(2, 9)
    moefast.accelerate(model, backend=backend)
    mx.eval(model(text))
    model.load_weights(list(parameters(other).items()))
    close(model(text), other(text))
    model.update(tree_unflatten(list(parameters(fresh()).items())))
    close(model(text), fresh()(text))


@BACKENDS
@pytest.mark.parametrize("module", ["glm4_moe", "gemma4_text", "phimoe", "qwen2_moe"])
def test_quantized_later(module: str, backend: str) -> None:
    model, plain, text = fresh(module), fresh(module), tokens(2, 9)
    moefast.accelerate(model, backend=backend)
    mx.eval(model(text))
    for one in (model, plain):
        nn.quantize(
            one,
            group_size=64,
            bits=4,
            class_predicate=lambda _, layer: (
                hasattr(layer, "to_quantized") and layer.weight.shape[-1] % 64 == 0
            ),
        )
    assert list(parameters(model)) == list(parameters(plain))
    stacks = [m for _, m in model.named_modules() if isinstance(m, SwitchGLU)]
    assert all(type(stack.up_proj) is QuantizedSwitchLinear for stack in stacks)
    want = plain(text)
    close(model(text), want)
    report = moefast.accelerate(model, backend=backend)
    assert report.accelerated
    close(model(text), want)
    moefast.restore(model)
    assert classes(model) == classes(plain)
    assert mx.array_equal(model(text), want).item()


@BACKENDS
@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_other_formats(mode: str, backend: str) -> None:
    model, text = fresh("gpt_oss"), tokens(2, 9)
    group_size = 16 if mode == "nvfp4" else 32
    nn.quantize(
        model,
        mode=mode,
        group_size=group_size,
        bits=8 if mode == "mxfp8" else 4,
        class_predicate=lambda path, layer: "experts" in path and hasattr(layer, "to_quantized"),
    )
    want = model(text)
    report = moefast.accelerate(model, backend=backend)
    assert [e.what for e in report.accelerated] == ["block"] * 2, str(report)
    close(model(text), want)


@BACKENDS
def test_mixed_formats_of_one_stack(backend: str) -> None:
    """As GraniteMoE's checkpoints have them: the down projection in 8 bits, the others in 4."""
    model, text = fresh("granitemoe"), tokens(2, 9)

    def bits(path: str, layer: nn.Module) -> Any:
        if not hasattr(layer, "to_quantized"):
            return False
        return {"group_size": 32 if "gate" in path else 64, "bits": 8 if "down_proj" in path else 4}

    nn.quantize(model, class_predicate=bits)
    want = model(text)
    report = moefast.accelerate(model, backend=backend)
    assert [e.what for e in report.accelerated] == ["block"] * 2, str(report)
    close(model(text), want)


@BACKENDS
def test_a_prompt_cache_goes_from_one_to_the_other(backend: str) -> None:
    model, text = fresh(bits=4), tokens(1, 12)
    want = model(text)
    cache = make_prompt_cache(model)
    model(text[:, :5], cache=cache)
    with moefast.accelerated(model, backend=backend):
        close(model(text[:, 5:8], cache=cache), want[:, 5:8])
        model(text[:, :2], cache=cache)
        assert trim_prompt_cache(cache, 2) == 2
        close(model(text[:, 8:9], cache=cache), want[:, 8:9])
    close(model(text[:, 9:], cache=cache), want[:, 9:])


@BACKENDS
def test_training_and_evaluation_take_turns(backend: str) -> None:
    model, text = fresh("qwen2_moe"), tokens(2, 9)
    want = model(text)
    moefast.accelerate(model, backend=backend)
    fast = model(text)
    assert mx.array_equal(model.train()(text), want).item()
    assert mx.array_equal(model.eval()(text), fast).item()
    assert mx.array_equal(model.train()(text[:, :1]), fresh("qwen2_moe")(text[:, :1])).item()


def test_the_context_gives_the_report_and_restores() -> None:
    model, text = fresh(), tokens(1, 4)
    want, kinds = model(text), classes(model)
    with moefast.accelerated(model, backend="reference") as report:
        assert [e.what for e in report.accelerated] == ["block"]
        assert classes(model) != kinds
    assert classes(model) == kinds
    assert mx.array_equal(model(text), want).item()


def test_auto_leaves_to_the_original_what_only_the_reference_could_do() -> None:
    model, kinds = fresh(), classes(fresh())
    with use_backend("reference"):
        report = moefast.accelerate(model, backend="auto", dense=False)
    # Asked for by name, the reference runs; what "auto" finds on its own is another matter.
    assert [e.what for e in report.accelerated] == ["block"]
    moefast.restore(model)
    assert classes(model) == kinds


def test_dbrx_is_unstacked_when_a_later_call_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, text = fresh("dbrx"), tokens(2, 9)
    want, names = model(text), sorted(parameters(model))
    moefast.accelerate(model, backend="reference")
    monkeypatch.setattr("moefast.acceleration.look.look_at_block", lambda *a: Verdict("for a reason"))
    report = moefast.accelerate(model, backend="reference")
    assert [e.reason for e in report.original] == ["for a reason"] * 2
    assert sorted(parameters(model)) == names
    assert mx.array_equal(model(text), want).item()


@needs_native
def test_auto_takes_the_native_backend_on_a_cpu() -> None:
    model = fresh(bits=4)
    with use_backend("auto"):
        report = moefast.accelerate(model)
    assert {b for e in report.accelerated for b in e.backends.values()} == {"native"}
    assert report.dense
    assert not moefast.accelerate(model, dense=False).dense


def test_the_report_for_programs() -> None:
    report = moefast.accelerate(fresh("qwen2_moe"), backend="reference")
    found = json.loads(json.dumps(report.to_dict()))
    assert found["counts"] == {"block": 2}
    assert found["entries"][0] == {
        "path": "model.layers.0.mlp",
        "kind": "Qwen2MoeSparseMoeBlock",
        "what": "block",
        "backends": {"decode": "reference", "band": "reference", "prefill": "reference"},
        "reason": None,
    }
    assert found["parameter_bytes"] == sum(a.nbytes for a in parameters(fresh("qwen2_moe")).values())
    assert "2 MoE blocks" in str(report)


@pytest.mark.parametrize("module", ["qwen2_moe", "gemma4_text", "phimoe"])
def test_the_report_says_where_everything_runs(module: str) -> None:
    report = moefast.accelerate(fresh(module), backend="reference")
    assert all(set(entry.backends) == {"decode", "band", "prefill"} for entry in report.accelerated)
    lines = [line for line in str(report).splitlines() if ": block on" in line or ": router on" in line]
    assert all(line.endswith(" on reference") for line in lines)


@BACKENDS
@pytest.mark.parametrize("bits", [None, 4])
@SHAPES
def test_memory_stays_what_it_was(module: str, bits: int | None, backend: str) -> None:
    """DBRX needs room for one projection of one layer while it is stacked, the others none at all."""
    model = fresh(module, bits=bits)
    held = sum(array.nbytes for array in parameters(model).values())
    largest = max(array.nbytes for array in parameters(model).values())
    gc.collect()
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    report = moefast.accelerate(model, backend=backend)
    room = 8 * largest if module == "dbrx" else 0  # eight experts' largest matrix
    assert mx.get_peak_memory() - before <= room + held // 100
    gc.collect()
    assert mx.get_active_memory() - before <= held // 100
    assert report.added_bytes <= held // 100
    if module != "dbrx":
        return
    mx.reset_peak_memory()
    moefast.restore(model)
    assert mx.get_peak_memory() - before <= 2 * room + held // 100
    gc.collect()
    assert mx.get_active_memory() - before <= held // 100


@pytest.mark.parametrize("frozen", [True, False])
def test_frozen_parameters_stay_frozen_through_dbrx(frozen: bool) -> None:
    model = fresh("dbrx")
    if frozen:
        model.freeze()
    before = dict(tree_flatten(model.trainable_parameters()))
    moefast.accelerate(model, backend="reference")
    stacked = dict(tree_flatten(model.trainable_parameters()))
    assert any("switch_mlp" in path for path in stacked) is not frozen
    moefast.restore(model)
    after = dict(tree_flatten(model.trainable_parameters()))
    assert after.keys() == before.keys()


def test_dbrx_adapted_while_stacked_stays_stacked() -> None:
    """Adapters of a stack have no place in a list: restore says so, and undoes nothing by halves."""
    model, text = fresh("dbrx"), tokens(2, 9)
    moefast.accelerate(model, backend="reference")
    keys = ["ffn.switch_mlp.up_proj"]
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": keys})
    want, kinds = model.eval()(text), classes(model)
    with pytest.raises(ValueError, match=r"^\[restore\] .*up_proj.*LoRASwitchLinear"):
        moefast.restore(model)
    assert classes(model) == kinds
    assert mx.array_equal(model(text), want).item()
