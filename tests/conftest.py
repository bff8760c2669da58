"""Fixtures shared by all tests."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator

import hypothesis
import mlx.core as mx
import numpy as np
import pytest
from factories import Floats, MakeExperts, MakeProjection, MakeShared

import moefast
from moefast import Activation, ExpertWeights, Projection, QuantSpec, SharedExpert, use_backend


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kernels", help="a file of moefast._kernels to test instead of the installed one")


def pytest_configure(config: pytest.Config) -> None:
    if file := config.getoption("--kernels"):
        spec = importlib.util.spec_from_file_location("moefast._kernels", file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["moefast._kernels"] = module


# Examples are not timed: `make test` runs other tests beside them.
hypothesis.settings.register_profile(
    "untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("untimed")

BACKENDS = [name for name, reason in moefast.backends().items() if reason is None]


@pytest.fixture(autouse=True)
def seed() -> None:
    """Every test starts from the same state of MLX's generator, whatever ran before."""
    mx.random.seed(0)


@pytest.fixture
def cpu() -> Iterator[None]:
    """MLX computes on the CPU: for what is about the CPU, on a Mac too."""
    former = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(former)


@pytest.fixture
def on_native() -> Iterator[None]:
    """``"auto"`` stands for the native backend."""
    with use_backend("native"):
        yield


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run here, in turn: what ``"auto"`` stands for during the test."""
    with use_backend(request.param):
        yield request.param


@pytest.fixture
def reference() -> Iterator[None]:
    """``"auto"`` is the reference during the test: for what is compared bit for bit with mlx-lm."""
    with use_backend("reference"):
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def floats(rng: np.random.Generator) -> Floats:
    """``floats(*shape, dtype=mx.float32, scale=1.0)``: normal values, exact in ``dtype``."""

    def make(*shape: int, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
        return mx.array((rng.standard_normal(shape) * scale).astype(np.float32)).astype(dtype)

    return make


@pytest.fixture
def projection(floats: Floats) -> MakeProjection:
    """``projection(*stack, out, in, quant=None, dtype=..., bias=False, global_scale=False)``: a weight that
    keeps the size of its input, quantized by MLX from ``dtype``."""

    def make(
        *shape: int,
        quant: QuantSpec | None = None,
        dtype: mx.Dtype = mx.float32,
        bias: bool = False,
        global_scale: bool = False,
    ) -> Projection:
        weight = floats(*shape, dtype=dtype, scale=shape[-1] ** -0.5)
        offset = floats(*shape[:-1], dtype=dtype, scale=0.5) if bias else None
        if quant is None:
            return Projection(weight, bias=offset)
        if not global_scale:
            return Projection(*mx.quantize(weight, **quant.mlx_arguments()), bias=offset, quant=quant)
        largest = mx.abs(weight).max(axis=(-2, -1)).astype(mx.float32)
        parts = [
            mx.quantize(w, **quant.mlx_arguments(), global_scale=g)
            for w, g in zip(weight.reshape(-1, *shape[-2:]), largest.flatten(), strict=True)
        ]
        packed, scales = (mx.stack(part).reshape(*shape[:-1], -1) for part in zip(*parts, strict=True))
        return Projection(packed, scales, bias=offset, global_scale=largest, quant=quant)

    return make


@pytest.fixture
def expert_weights(projection: MakeProjection) -> MakeExperts:
    """``expert_weights(E, hidden, width, activation=..., **of_each_projection)``."""

    def make(
        experts: int,
        hidden: int,
        width: int,
        *,
        activation: Activation = Activation(),  # noqa: B008 (frozen)
        **format_: object,
    ) -> ExpertWeights:
        return ExpertWeights(
            gate=projection(experts, width, hidden, **format_) if activation.gated else None,
            up=projection(experts, width, hidden, **format_),
            down=projection(experts, hidden, width, **format_),
            activation=activation,
        )

    return make


@pytest.fixture
def shared_expert(projection: MakeProjection) -> MakeShared:
    """``shared_expert(hidden, width, output_gate=False, **of_each_projection)``."""

    def make(hidden: int, width: int, *, output_gate: bool = False, **format_: object) -> SharedExpert:
        return SharedExpert(
            gate=projection(width, hidden, **format_),
            up=projection(width, hidden, **format_),
            down=projection(hidden, width, **format_),
            output_gate=projection(1, hidden, **format_) if output_gate else None,
        )

    return make
