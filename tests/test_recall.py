"""Layers remember the kernel of their last call; whatever changes in between, the next is not stale."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn
import pytest
from mlx.utils import tree_map
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

import moefast
from moefast import Activation, RouterSpec, nn, use_backend
from moefast.backends import native, registry
from moefast.nn.recall import products
from moefast.testing import assert_close, float64

pytestmark = [
    pytest.mark.usefixtures("cpu", "on_native"),
    pytest.mark.skipif(not native.bindings().native, reason=native.bindings().reason),
]

SPEC = RouterSpec(num_experts=8, top_k=3, renormalize=True)
HIDDEN, WIDTH = 64, 128
CLOSE = {"reductions": (HIDDEN, WIDTH), "top_k": 3}


def make_block(bits: int | None = 4, **options: Any) -> nn.MoE:
    block = nn.MoE(SPEC, HIDDEN, WIDTH, shared_width=WIDTH, shared_gate=True, **options)
    if bits is not None:
        mlx.nn.quantize(block, group_size=32, bits=bits)
    return block.eval()


@pytest.fixture
def block() -> nn.MoE:
    """One that has been called, and remembers."""
    block = make_block()
    mx.eval(block(inputs()))
    assert block._recall is not None
    return block


def inputs(*lead: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal((*(lead or (5,)), HIDDEN)).astype(dtype)


def check(block: nn.MoE, x: mx.array | None = None) -> None:
    """Twice what the reference, which remembers nothing, computes of the block as it is now."""
    x = inputs() if x is None else x
    with use_backend("reference"):
        want = block(x)
    for _ in range(2):
        got = block(x)
        assert (got.shape, got.dtype) == (want.shape, want.dtype)
        assert_close(got, float64(want), "moe", **CLOSE)


def double(layer: mlx.nn.Module) -> None:
    layer.update(tree_map(lambda p: 2 * p if p.dtype != mx.uint32 else p, layer.parameters()))


def renew_in_place(block: nn.MoE) -> None:
    for _, layer in block.named_modules():
        for array in layer.values():
            if isinstance(array, mx.array) and array.dtype == mx.float32:
                array[:] = 0.5 * array


def promote_in_place(block: nn.MoE) -> None:
    """The Python object stays, its dtype does not."""
    scales, biases = (block.switch_mlp.up_proj[name] for name in ("scales", "biases"))
    block.set_dtype(mx.bfloat16)
    mx.eval(block(inputs()))
    scales, biases = (block.switch_mlp.up_proj[name] for name in ("scales", "biases"))
    for array in (scales, biases):
        array += mx.zeros(array.shape)
    assert block.switch_mlp.up_proj.scales is scales
    assert scales.dtype == mx.float32


def adapt_shared(block: nn.MoE) -> None:
    adapted = LoRALinear.from_base(block.shared_experts.up_proj)
    adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
    block.shared_experts.up_proj = adapted


def adapt_experts(block: nn.MoE) -> None:
    adapted = LoRASwitchLinear.from_base(block.switch_mlp.down_proj)
    adapted.lora_b = mx.random.normal(adapted.lora_b.shape)
    block.switch_mlp.down_proj = adapted


class Negated(nn.QuantizedLinear):
    """A layer with the parameters of another, that computes something else."""

    def __call__(self, x: mx.array) -> mx.array:
        return -super().__call__(x)


def put_in_a_subclass(block: nn.MoE) -> None:
    block.shared_experts.up_proj.__class__ = Negated


CHANGES: dict[str, Callable[[nn.MoE], Any]] = {
    "nothing": lambda block: None,
    "other values": lambda block: double(block),
    "other values of a part": lambda block: double(block.shared_experts.down_proj),
    "values changed in place": renew_in_place,
    "dtypes changed in place": promote_in_place,
    "another dtype": lambda block: block.set_dtype(mx.bfloat16),
    "another dtype of a part": lambda block: block.switch_mlp.set_dtype(mx.float16),
    "an output bias": lambda block: setattr(block.switch_mlp.up_proj, "bias", mx.ones((8, WIDTH))),
    "another router": lambda block: setattr(block, "spec", replace(SPEC, top_k=5)),
    "another activation": lambda block: setattr(block.switch_mlp, "activation", Activation(name="situ")),
    "another activation of the shared expert": lambda block: setattr(
        block.shared_experts, "activation", Activation(name="geglu_tanh")
    ),
    "another combine": lambda block: setattr(block, "combine_dtype", mx.bfloat16),
    "adapted experts": adapt_experts,
    "an adapted shared expert": adapt_shared,
    "other bits": lambda block: setattr(block, "switch_mlp", make_block(8).switch_mlp),
    "unquantized experts": lambda block: setattr(block, "switch_mlp", make_block(None).switch_mlp),
    "an unquantized shared gate": lambda block: setattr(
        block, "shared_expert_gate", nn.Linear(HIDDEN, 1, bias=False)
    ),
    "training": lambda block: block.train(),
    "training of a part": lambda block: block.gate.train(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_is_seen(change: Callable[[nn.MoE], Any], block: nn.MoE) -> None:
    change(block)
    check(block)


def test_a_layer_of_another_class_is_called(block: nn.MoE) -> None:
    x = inputs()
    plain = block(x)
    put_in_a_subclass(block)
    other = block(x)
    assert not mx.array_equal(plain, other)
    # Both gate and up are negated or neither: silu(g) * -u.
    block.shared_experts.up_proj.__class__ = nn.QuantizedLinear
    assert mx.array_equal(block(x), plain)


def test_calls_of_other_kinds_in_turn(block: nn.MoE) -> None:
    for lead in ((1,), (200,), (1, 1), (3, 2), (0,), (2, 100)):
        check(block, inputs(*lead))
        check(block, inputs(*lead, dtype=mx.bfloat16))


def test_every_phase_is_chosen_and_told(block: nn.MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_choices", {})
    for tokens in (200, 1, 1, 5):
        block(inputs(tokens))
    found = {(p.op, p.phase, c.backend) for p, c in registry.choices() if p.op == "moe"}
    assert found == {("moe", phase, "native") for phase in ("prefill", "decode", "band")}


def test_the_default_backend_may_change(block: nn.MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_choices", {})
    with use_backend("reference"):
        block(inputs())
    assert {c.backend for _, c in registry.choices()} == {"reference"}


def test_training_runs_the_reference(block: nn.MoE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_choices", {})
    block.train()
    block(inputs())
    assert {c.backend for _, c in registry.choices()} == {"reference"}


@pytest.mark.parametrize("x", [mx.zeros((3, HIDDEN - 1)), mx.zeros((3, HIDDEN), mx.int32), mx.zeros(())])
def test_bad_input_gets_the_usual_words(x: mx.array, block: nn.MoE) -> None:
    with pytest.raises(ValueError, match=r"\[quantized_matmul\] x"):
        block(x)


def test_what_was_replaced_is_free_at_once(block: nn.MoE) -> None:
    """Before the next call: quantizing or merging a large model must not hold both."""
    x = inputs(1)
    mx.eval(block(x))
    old = [weakref.ref(block.switch_mlp.up_proj.weight), weakref.ref(block.shared_experts.gate_proj.scales)]
    block.switch_mlp = make_block().switch_mlp
    double(block.shared_experts)
    gc.collect()
    assert [ref() for ref in old] == [None, None]


def test_copies_begin_anew(block: nn.MoE) -> None:
    for other in (copy.deepcopy(block), copy.copy(block)):
        check(other)
    assert pickle.loads(pickle.dumps(block._recall)) is None
    assert copy.deepcopy(block)._recall is None


def test_it_costs_no_parameters(block: nn.MoE) -> None:
    """Nothing of it is saved, counted or trained."""
    assert not any("recall" in path for path, _ in mlx.utils.tree_flatten(block.parameters()))
    assert not any("recall" in name for name, _ in block.named_modules())
    assert moefast.nn.MoE(SPEC, HIDDEN, WIDTH)._recall is None


def test_dense_layers_and_heads() -> None:
    x = inputs()
    for layer in (
        nn.Linear(HIDDEN, 32),
        nn.QuantizedLinear(HIDDEN, 32, bits=8, group_size=32),
        nn.Embedding(40, HIDDEN),
        nn.Embedding(40, HIDDEN).to_quantized(32, 4),
    ):
        layer.eval()
        run = layer.as_linear if hasattr(layer, "as_linear") else layer
        for change in (lambda: None, lambda layer=layer: double(layer), lambda layer=layer: layer.train()):
            change()
            with use_backend("reference"):
                want = run(x)
            for _ in range(2):
                assert_close(run(x), float64(want), "moe", **CLOSE)


class ThreeOfOne(mlx.nn.Module):
    """What an attention does with its inputs."""

    def __init__(self, bits: int | None) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(HIDDEN, size, bias=size == 8) for size in (32, 8, 40))
        if bits is not None:
            mlx.nn.quantize(self, group_size=32, bits=bits)

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate(products(self, x, (self.a, self.b, self.c)), axis=-1)


@pytest.mark.parametrize("bits", [None, 4])
def test_several_layers_of_one_input(bits: int | None) -> None:
    def replace_one(three: ThreeOfOne) -> None:
        three.b = mlx.nn.Linear(HIDDEN, 8)

    def put_something_else_there(three: ThreeOfOne) -> None:
        three.b = mlx.nn.Sequential(mlx.nn.Linear(HIDDEN, 8), mlx.nn.Tanh())

    three = ThreeOfOne(bits).eval()
    changes: list[Callable[[ThreeOfOne], Any]] = [
        lambda three: None,
        lambda three: double(three.a),
        lambda three: three.train(),
        lambda three: three.eval(),
        replace_one,
        put_something_else_there,
        lambda three: three.set_dtype(mx.bfloat16),
    ]
    for change in changes:
        change(three)
        for lead in ((5,), (1,), (2, 3), (200,)):
            x = inputs(*lead)
            with use_backend("reference"):
                want = three(x)
            for _ in range(2):
                got = three(x)
                assert (got.shape, got.dtype) == (want.shape, want.dtype)
                assert_close(got, float64(want), "moe", **CLOSE)
    assert "_recall_products" in three.__dict__
    assert not any("recall" in path for path, _ in mlx.utils.tree_flatten(three.parameters()))


def test_routers_of_both_kinds() -> None:
    x = inputs()
    for linear in ("layer", None):
        router = nn.Router(replace(SPEC, score="sigmoid"), HIDDEN, linear=linear, selection_bias="bias")
        router.eval()
        for _ in range(3):
            got = router.logits(x)
            with use_backend("reference"):
                assert_close(got, float64(router.logits(x)), "moe", **CLOSE)
            double(router)
