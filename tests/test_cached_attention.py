"""``moefast.ops.cached_attention`` on every backend, against float64 and against its parts."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Floats
from formats import DTYPES
from marks import needs_native
from mlx_lm.models.cache import KVCache
from oracle import attention as attended
from test_rope import oracle as turned
from test_rope import wavelengths

import moefast
from moefast.ops import Rotation, cached_attention
from moefast.testing import assert_close, float64

BACKENDS = tuple(name for name, reason in moefast.backends().items() if reason is None)
SCALE = 0.2


def split(x: mx.array, dims: int) -> mx.array:
    return x.reshape(*x.shape[:2], -1, dims).swapaxes(1, 2)


def inputs(
    floats: Floats, dtype: mx.Dtype, length: int, heads: int = 4, kv_heads: int = 2, dims: int = 16
) -> tuple[mx.array, ...]:
    """Queries, keys and values out of one product, and a cache of 40 rows."""
    fused = floats(2, length, (heads + 2 * kv_heads) * dims, dtype=dtype)
    parts = mx.split(fused, [heads * dims, (heads + kv_heads) * dims], axis=-1)
    return *parts, *(floats(2, kv_heads, 40, dims, dtype=dtype) for _ in range(2))


def occupy_the_stream() -> None:
    """With a tenth of a second of work, so that what is asked for next is queued behind it."""
    x = mx.ones((512, 512))
    mx.async_eval(x @ x @ x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("length", "offset"), [(1, 0), (1, 25), (1, 39), (7, 3), (40, 0)])
@pytest.mark.parametrize("kind", ["base", "freqs", "traditional"])
def test_equals_the_oracle(
    floats: Floats, backend: str, dtype: mx.Dtype, length: int, offset: int, kind: str
) -> None:
    dims = 16
    q, k, v, cache_keys, cache_values = inputs(floats, dtype, length)
    periods = mx.array(np.linspace(1, 50, 4), dtype=mx.float32)
    rotation = {
        "base": Rotation(16, base=1e4),
        "freqs": Rotation(8, freqs=periods),
        "traditional": Rotation(16, True, 1e4, 0.5),
    }[kind]
    freqs = float64(periods) if kind == "freqs" else wavelengths(1e4, dims) / rotation.scale

    def turn(x: mx.array) -> mx.array:
        return mx.array(turned(split(x, dims), rotation.dims, [offset] * 2, freqs, rotation.traditional))

    end = offset + length
    y, keys, values = cached_attention(
        q, k, v, cache_keys, cache_values,
        offset=offset, rotation=rotation, scale=SCALE, causal=True, backend=backend,
    )  # fmt: skip
    assert (y.dtype, y.shape) == (dtype, (2, length, 64))
    assert_close(keys[:, :, offset:end], float64(turn(k)), "rope", reductions=(end**2,))
    assert mx.array_equal(values[:, :, offset:end], split(v, dims))
    for now, before in ((keys, cache_keys), (values, cache_values)):
        assert mx.array_equal(now[:, :, :offset], before[:, :, :offset])
        assert mx.array_equal(now[:, :, end:], before[:, :, end:])
    want = attended(turn(q), keys[:, :, :end], values[:, :, :end], SCALE, True)
    assert_close(y, want, "attention", dtype=dtype, reductions=(dims, end, end**2))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_caches_of_others_stay_as_they_are(floats: Floats, backend: str) -> None:
    """Rows are written in place only where nobody else holds the cache."""
    q, k, v, cache_keys, cache_values = inputs(floats, mx.float32, 1)
    kept = np.array(cache_keys), np.array(cache_values)
    settings: dict[str, Any] = {"rotation": Rotation(16, base=1e4), "scale": SCALE, "causal": False}
    for _ in range(2):
        out = cached_attention(q, k, v, cache_keys, cache_values, offset=5, backend=backend, **settings)
        mx.eval(out)
        assert np.array_equal(kept[0], cache_keys)
        assert np.array_equal(kept[1], cache_values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_steps_without_evaluation(floats: Floats, backend: str) -> None:
    """Each step's cache is the next one's; evaluated at the end, all at once or one by one."""
    settings: dict[str, Any] = {"rotation": Rotation(16, base=1e4), "scale": SCALE, "causal": False}
    q, k, v, *cache = inputs(floats, mx.float32, 1)
    results = []
    for lazy in (True, False):
        keys, values = (mx.array(np.array(array)) for array in cache)
        ys = []
        for offset in range(12):
            y, keys, values = cached_attention(
                q * (offset + 1), k - offset, v, keys, values, offset=offset, backend=backend, **settings
            )
            ys.append(y)
            if not lazy:
                mx.eval(y, keys, values)
        results.append([*ys, keys, values])
    for a, b in zip(*results, strict=True):
        assert mx.array_equal(a, b)


@needs_native
@pytest.mark.parametrize("waits", [True, False])
def test_native_writes_in_place(floats: Floats, waits: bool) -> None:
    """A cache of 64 MB held by nobody else: the peak of memory does not grow by another one, whether each
    step is over or still runs when the next is built, as where tokens are generated."""
    q, k, v, *_ = inputs(floats, mx.float32, 1)
    keys, values = (mx.zeros((2, 2, 1 << 18, 16)) for _ in range(2))
    mx.eval(q, k, v, keys, values)
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    ys = []
    if not waits:
        occupy_the_stream()
    for offset in range(6):
        y, keys, values = cached_attention(
            q, k, v, keys, values,
            offset=offset, rotation=Rotation(16, base=1e4), scale=SCALE, causal=False, backend="native",
        )  # fmt: skip
        (mx.eval if waits else mx.async_eval)(y)
        ys.append(y)
    mx.eval(ys, keys, values)
    assert mx.get_peak_memory() - held < keys.nbytes / 2


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("asked", ["y", "keys"])  # which output MLX evaluates
@pytest.mark.parametrize("kept", ["array", "view", "nothing"])
def test_steps_that_still_run_keep_what_others_hold(
    floats: Floats, backend: str, asked: str, kept: str
) -> None:
    """The next steps are built while one runs; what is held of its cache stays as it was."""
    settings: dict[str, Any] = {"rotation": Rotation(16, base=1e4), "scale": SCALE, "causal": False}
    q, k, v, *start = inputs(floats, mx.float32, 1)
    steps = range(7, 12)
    want = []
    keys, values = (mx.array(np.array(array)) for array in start)
    for offset in steps:
        y, keys, values = cached_attention(
            q, k, v, keys, values, offset=offset, backend="reference", **settings
        )
        want.append([float64(array) for array in (y, keys, values)])
    keys, values = (mx.array(np.array(array)) for array in start)
    mx.eval(q, k, v, keys, values)
    ys, holding = [], []
    occupy_the_stream()
    for offset in steps:
        y, keys, values = cached_attention(q, k, v, keys, values, offset=offset, backend=backend, **settings)
        mx.async_eval(y if asked == "y" else keys)
        ys.append(y)
        if kept == "array":
            holding.append((keys, values))
        elif kept == "view":
            views = keys[:, :, 1:], values[:, :, 1:]
            mx.async_eval(*views)
            holding.append(views)
    for y, (want_y, _, _) in zip(ys, want, strict=True):
        assert_close(y, want_y, "attention", reductions=(16, 40, 40**2))
    skipped = 1 if kept == "view" else 0
    for held, (_, *whole) in zip(holding, want, strict=False):
        for got, rows in zip(held, whole, strict=True):
            assert_close(got, rows[:, :, skipped:], "rope", reductions=(40**2,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seen", [1, 2])
def test_steps_of_one_graph_keep_what_others_hold(floats: Floats, backend: str, seen: int) -> None:
    """MLX evaluates the first step for one of its caches, whose memory no task holds; then the view of it;
    then the second step, which must not write there."""
    settings: dict[str, Any] = {"rotation": Rotation(16, base=1e4), "scale": SCALE, "causal": False}
    q, k, v, *cache = inputs(floats, mx.float32, 1)
    mx.eval(q, k, v)
    want = cached_attention(q, k, v, *cache, offset=7, backend="reference", **settings)[seen][:, :, 1:]
    want = float64(want)
    occupy_the_stream()
    caches = [mx.array(np.array(array)) for array in cache]
    _, *caches = cached_attention(q, k, v, *caches, offset=7, backend=backend, **settings)
    view = caches[seen - 1][:, :, 1:]
    y, *caches = cached_attention(q, k, v, *caches, offset=8, backend=backend, **settings)
    mx.async_eval(y, view)
    assert_close(view, want, "rope", reductions=(40**2,))


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_compile_vmap(floats: Floats, backend: str) -> None:
    arrays = inputs(floats, mx.float32, 3)

    def run(*arrays: mx.array, name: str = backend) -> tuple[mx.array, ...]:
        return cached_attention(
            *arrays, offset=4, rotation=Rotation(16, base=1e4), scale=SCALE, causal=True, backend=name
        )  # type: ignore[misc]

    def loss(name: str) -> Any:
        return lambda *arrays: sum((out**2).sum() for out in run(*arrays, name=name))

    for argnum in range(5):
        got = mx.grad(loss(backend), argnum)(*arrays)
        want = mx.grad(loss("reference"), argnum)(*arrays)
        assert_close(got, float64(want), "attention", reductions=(16, 7, 49), gradient=True)
    for got, want in zip(mx.compile(run)(*arrays), run(*arrays), strict=True):
        assert mx.array_equal(got, want)
    both = [mx.stack([array, 2 * array]) for array in arrays]
    for got, want in zip(mx.vmap(run)(*both), run(*(2 * array for array in arrays)), strict=True):
        assert_close(got[1], float64(want), "attention", reductions=(16, 7, 49))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_model_decodes_alike_with_and_without(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a model does with a plain cache, and with one that has another type."""
    from model_builders import ours
    from model_cases import BASE

    class Other(KVCache):
        pass

    for family in ("qwen2_moe", "dbrx", "glm4_moe"):
        model = ours(BASE[family])
        prompt = mx.arange(9)[None] % 50
        logits = []
        with moefast.use_backend(backend):
            for kind in (KVCache, Other):
                cache = [kind() for _ in model.layers]
                steps = [model(prompt, cache=cache)] + [
                    model(prompt[:, i : i + 1], cache=cache) for i in range(4)
                ]
                logits.append(mx.concatenate(steps, axis=1))
                assert cache[0].offset == 13
        assert_close(logits[0], float64(logits[1]), "moe", reductions=(64,) * 8)


GOOD = ((1, 1, 64), (1, 1, 32), (1, 1, 32), (1, 2, 8, 16), (1, 2, 8, 16))


@pytest.mark.parametrize(
    ("changed", "settings", "rule"),
    [
        ({0: (1, 64)}, {}, "must have 3 dimensions"),
        ({0: (1, 1, 60)}, {}, "queries must be"),
        ({0: (1, 0, 64), 1: (1, 0, 32), 2: (1, 0, 32)}, {}, "queries must be"),
        ({1: (1, 1, 16)}, {}, "keys must be"),
        ({2: (1, 2, 32)}, {}, "values must be"),
        ({3: (2, 2, 8, 16)}, {}, "caches must be"),
        ({4: (1, 2, 9, 16)}, {}, "caches must be"),
        ({}, {"offset": 8}, r"offset must leave room in the cache: 0\.\.7, got 8"),
        ({}, {"offset": -1}, "offset must leave room"),
        ({}, {"rotation": Rotation(18, base=1e4)}, r"rotation.dims must be even and in 2\.\.16"),
        ({}, {"rotation": Rotation(16)}, "either base or freqs"),
        ({}, {"rotation": Rotation(16, freqs=mx.ones(3))}, "freqs must be"),
    ],
)
def test_refuses_what_does_not_fit(
    changed: dict[int, tuple[int, ...]], settings: dict[str, Any], rule: str
) -> None:
    arrays = [mx.ones(changed.get(i, shape)) for i, shape in enumerate(GOOD)]
    usual = {"offset": 0, "rotation": Rotation(16, base=1e4), "scale": 1.0, "causal": False}
    with pytest.raises(ValueError, match=rule):
        cached_attention(*arrays, **{**usual, **settings})


@pytest.mark.parametrize("offset", [8, 2**31 - 1, -1])
def test_the_binding_itself_writes_nowhere_else(offset: int) -> None:
    native = pytest.importorskip("moefast._native", reason="moefast was installed without it")
    arrays = [mx.ones(shape) for shape in GOOD]
    with pytest.raises(ValueError, match=r"\[cached_attention\] offset \+ length must be within"):
        native.cached_attention(*arrays, offset, 16, False, 1e4, 1.0, None, 1.0, False)
