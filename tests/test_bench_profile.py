"""``moefast bench --profile``: every moment belongs to one part, the model that runs is the real one, and
it is put back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn
import pytest
from marks import needs_native
from mlx_lm.models.cache import KVCache
from model_builders import ours, prompt_cache, theirs, tokens
from model_cases import FULL, Case

import moefast
from moefast import use_backend
from moefast.lm.bench import cli
from moefast.lm.bench import profile as profiles
from moefast.lm.bench.measure import PHASES
from moefast.lm.bench.profile import PARTS, Runs, Stopwatch, parts_of, profile, watched
from moefast.lm.bench.subjects import Forward
from moefast.models.attention import Attention
from moefast.nn import MoE

pytestmark = pytest.mark.usefixtures("cpu")

cases = pytest.mark.parametrize("case", FULL, ids=str)

# -- time --------------------------------------------------------------------------------------------------


def test_every_moment_is_one_parts() -> None:
    """The clock strikes whenever it is asked: once for Python and once for evaluation at each step."""
    strikes = count()
    watch = Stopwatch(lambda: float(next(strikes)))
    x = mx.zeros(2)
    watch.enter("between the parts", ())
    watch.enter("attention", [x])  # Python and evaluation of whoever calls
    watch.enter("rope", ([x], {"offset": 3}))
    watch.leave(x)
    watch.enter("rope", [x])
    watch.leave(x)
    watch.leave((x, None))
    watch.leave([x, x])
    costs = {part: cost for part, cost in watch.costs.items() if cost.calls}
    assert {part: cost.calls for part, cost in costs.items()} == {
        "rope": 2,
        "attention": 1,
        "between the parts": 1,
    }
    # Before each of two ropes, and at the end: three stretches of the attention's own.
    assert [costs[part].python for part in costs] == [2.0, 3.0, 2.0]
    assert [costs[part].evaluating for part in costs] == [2.0, 3.0, 2.0]


class Slow(mlx.nn.Module):
    """Takes its time in Python, then returns something that takes time to evaluate."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlx.nn.RMSNorm(64)
        self.large = mx.random.normal((700, 700))
        mx.eval(self.parameters())

    def __call__(self, x: mx.array) -> mx.array:
        time.sleep(0.05)
        y = self.inner(x)
        product = self.large
        for _ in range(10):
            product = product @ self.large
        return y + product.sum() * 0


def test_python_and_evaluation_are_told_apart() -> None:
    model, watch = mlx.nn.Sequential(Slow()), Stopwatch()
    block, inner = (path for path, m in model.named_modules() if isinstance(m, Slow | mlx.nn.RMSNorm))
    if isinstance(dict(model.named_modules())[block], mlx.nn.RMSNorm):
        block, inner = inner, block
    parts = [
        profiles.Part(block, "__call__", "MoE block"),
        profiles.Part(inner, "__call__", "norms"),
    ]
    with watched(model, [], parts, watch):
        watch.enter("between the parts", ())
        watch.leave(model(mx.ones((2, 64))))
    slow, norm = watch.costs["MoE block"], watch.costs["norms"]
    assert slow.python >= 0.05
    assert slow.evaluating > norm.evaluating > 0
    assert norm.python < slow.python / 2


# -- parts -------------------------------------------------------------------------------------------------


@cases
def test_both_packages_models_have_the_same_parts(case: Case) -> None:
    """mlx-lm's model is looked at by moefast's paths."""
    model = ours(case.config)
    parts = parts_of(model)
    other = dict(theirs(case.config, ours_weights(model)).named_modules())
    own = dict(model.named_modules())
    for part in parts:
        for modules in (own, other):
            assert part.path in modules, part
    layers = len(model.layers)
    blocks = [m for m in model.modules() if isinstance(m, MoE)]
    names = [part.name for part in parts]
    assert names.count("attention") == names.count("rope") == names.count("output projection") == layers
    assert names.count("MoE block") == names.count("router") == len(blocks) > 0
    assert names.count("dense MLP") == layers - len(blocks)
    assert {"embedding", "norms", "qkv projection", "lm_head"} <= set(names) <= set(PARTS)


def ours_weights(model: mlx.nn.Module) -> dict[str, mx.array]:
    return dict(mlx.utils.tree_flatten(model.parameters()))


def step(model: Any, cache: Any) -> list[mx.array]:
    return [model(tokens(1, 1), cache)]


@contextmanager
def filled(model: Any) -> Iterator[list[Any]]:
    """A cache of some tokens, with room for more."""
    cache = prompt_cache(model)
    mx.eval(model(tokens(1, 20), cache))
    yield cache


@pytest.mark.parametrize("package", ["moefast", "mlx-lm"])
@cases
def test_a_watched_model_computes_the_same_and_is_put_back(case: Case, package: str) -> None:
    mine = ours(case.config, bits=4)
    model: Any = (
        mine if package == "moefast" else theirs(case.config, ours_weights(ours(case.config)), bits=4)
    )
    before = {path: type(module) for path, module in model.named_modules()}
    update = KVCache.update_and_fetch
    with filled(model) as cache:
        want = step(model, cache)
        mx.eval(want)
        for layer in cache:
            layer.trim(1)
        watch = Stopwatch()
        with watched(model, cache, parts_of(mine), watch):
            watch.enter("between the parts", ())
            got = step(model, cache)
            watch.leave(got)
        assert mx.array_equal(got[0], want[0])
        with (
            pytest.raises(RuntimeError, match="on the way"),
            watched(model, cache, parts_of(mine), Stopwatch()),
        ):
            raise RuntimeError("on the way")
    assert {path: type(module) for path, module in model.named_modules()} == before
    assert KVCache.update_and_fetch is update
    assert {type(layer) for layer in cache} == {KVCache}

    calls = {part: cost.calls for part, cost in watch.costs.items()}
    layers = len(mine.layers)
    attention = next(m for m in mine.modules() if isinstance(m, Attention))
    of_queries = sum(name in attention for name in attention.NORMS)
    assert calls["attention"] == calls["output projection"] == layers
    projections = 1 if package == "moefast" else len(attention.INPUTS)
    assert calls["qkv projection"] == projections * layers
    assert calls["norms"] == (2 + of_queries) * layers + 1
    assert calls["MoE block"] + calls["dense MLP"] == layers
    assert calls["router"] == calls["MoE block"]
    assert calls["embedding"] == calls["lm_head"] == calls["between the parts"] == 1
    # moefast's attention turns, stores and attends in one operation.
    apart = 0 if package == "moefast" else layers
    assert (calls["cache update"], calls["rope"]) == (apart, 2 * apart)


@needs_native
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_steps_of_an_attention_in_one_operation(backend: str) -> None:
    case = next(case for case in FULL if case.family == "qwen2_moe")
    model = ours(case.config, bits=4)
    runs = Runs()
    with use_backend(backend), filled(model) as cache:
        parts = parts_of(model)
        want = runs.in_one_piece(Forward(model, cache, [lambda: step(model, cache)]))
        cache[0].trim(1), cache[1].trim(1)
        runs.stopped(Forward(model, cache, [lambda: step(model, cache)]), parts)
        assert runs.in_one_operation
        cache[0].trim(1), cache[1].trim(1)
        got = runs.stopped(Forward(model, cache, [lambda: step(model, cache)]), parts, one_by_one=True)
    assert mx.allclose(got[0][0], want[0][0])
    found = runs.profile("decode", 1)
    assert {part: cost.calls for part, cost in found.steps.items()} == {
        "rope": 4,
        "cache update": 2,
        "attention": 2,
    }
    assert all(cost.evaluating > 0 for cost in found.steps.values())
    assert found.stopped == pytest.approx(sum(c.python + c.evaluating for c in found.costs.values()))
    assert 0 < found.building < found.whole


# -- measuring ---------------------------------------------------------------------------------------------


def subject(values: Any) -> Any:
    """One whose passes return what there is next."""

    @contextmanager
    def opened(phase: str, length: int) -> Iterator[Forward]:
        yield Forward(mlx.nn.Sequential(), [], [lambda: [mx.array(next(values))] for _ in range(length)])

    return SimpleNamespace(label="a subject", opened=opened)


def test_enough_passes_or_the_seconds_end_it() -> None:
    same = iter(lambda: 1.0, 0.0)
    found = profile(subject(same), [], "decode", 4, passes=9, seconds=60)
    assert (found.passes, found.tokens, found.phase) == (12, 4, "decode")  # whole runs of four
    assert profile(subject(same), [], "decode", 4, passes=1_000_000, seconds=0).passes == 4


def test_a_result_that_stops_change_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="a decode of a subject must not change by stops"):
        profile(subject(count()), [], "decode", 2, passes=1, seconds=1)
    assert profile(subject(iter(lambda: float("nan"), 0)), [], "decode", 1, passes=1, seconds=1).passes == 1


def test_the_command_prints_tables_and_json(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["mlx-lm-fp32", *(name for name, reason in moefast.backends().items() if reason is None)]
    arguments = ["--size", "tiny", "--families", "qwen2_moe", "--budget", "5", "--repeats", "1"]
    sizes = ["--prompt-tokens", "16", "--decode-tokens", "2"]
    assert cli.main([*arguments, *sizes, "--subjects", *names, "--profile"]) == 0
    out = capsys.readouterr().out
    for row in ("qkv projection", "MoE block", "between the parts", "all parts", "in one piece"):
        assert out.count(row) >= len(names)
    (repeat,) = (line for line in out.splitlines() if line.startswith("to repeat:"))
    assert " --profile" in repeat
    result = json.loads(out.splitlines()[-1])
    assert result["settings"]["profile"] is True
    for one in result["families"][0]["subjects"]:
        # A busy machine may leave no time for a phase: what was measured is profiled.
        assert one["profile"].keys() == {phase for phase in PHASES if one[phase]["points"]} >= {"decode"}
        for found in one["profile"].values():
            assert sum(p["python"] + p["evaluating"] for p in found["parts"].values()) == pytest.approx(
                found["stopped"], rel=1e-4
            )
            assert 0 < found["building"] < found["whole"]
            assert set(found["parts"]) <= set(PARTS)
