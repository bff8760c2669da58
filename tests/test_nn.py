"""The layers: adapted, quantized by default numbers, named badly, and without mlx-lm."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import mlx.core as mx
import mlx.nn
import pytest
from mlx_lm.tuner.lora import LoRALinear, LoRASwitchLinear

from moefast import Activation, ExpertWeights, Projection, RouterSpec, nn, switch_glu
from moefast.testing import assert_close

SPEC = RouterSpec(num_experts=8, top_k=4)
HIDDEN, WIDTH = 64, 128
REDUCTIONS = (HIDDEN, WIDTH)


def block(spec: RouterSpec = SPEC, **options: Any) -> nn.MoE:
    made = nn.MoE(spec, HIDDEN, WIDTH, **options)
    made.eval()
    return made


def adapt(moe: nn.MoE, *names: str, learned: bool = False) -> None:
    """Put LoRA around projections of the experts; it does nothing yet unless ``learned``."""
    for name in names:
        adapted = LoRASwitchLinear.from_base(moe.switch_mlp[name], scale=2.0)
        if learned:
            adapted.lora_b = mx.random.normal(adapted.lora_b.shape) * 0.1
        setattr(moe.switch_mlp, name, adapted)
    moe.eval()


@pytest.mark.parametrize("tokens", [3, 50])  # below and above the number from which routes are sorted
@pytest.mark.parametrize("identity", [0, 3])  # LongCat's experts that return their input
@pytest.mark.parametrize("where", ["up_proj", "all projections", "shared expert"])
def test_an_adapter_that_does_nothing_changes_nothing(tokens: int, identity: int, where: str) -> None:
    moe = block(RouterSpec(num_experts=8, top_k=4, identity_experts=identity), shared_width=WIDTH)
    x = mx.random.normal((tokens, HIDDEN))
    plain = moe(x)
    if where == "shared expert":
        moe.shared_experts.up_proj = LoRALinear.from_base(moe.shared_experts.up_proj)
        moe.eval()
    else:
        adapt(moe, *(["up_proj"] if where == "up_proj" else ["gate_proj", "up_proj", "down_proj"]))
    assert_close(moe(x), plain, "moe", reductions=REDUCTIONS, top_k=4)


@pytest.mark.parametrize("bits", [None, 4])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_adapted_experts_are_as_accurate_as_plain_ones(bits: int | None, dtype: mx.Dtype) -> None:
    """MLX's CPU refuses half-precision stacks, and sums quantized half-precision products in that dtype."""
    moe = block()
    if bits:
        mlx.nn.quantize(moe.switch_mlp, bits=bits, group_size=64)
    adapt(moe, "up_proj", "down_proj", learned=True)
    moe.set_dtype(dtype)
    x = mx.random.normal((30, HIDDEN)).astype(dtype)
    indices = mx.random.randint(0, 8, (30, 4))
    got = moe.switch_mlp(x, indices)
    moe.set_dtype(mx.float32)
    want = moe.switch_mlp(x.astype(mx.float32), indices)
    # An adapted projection rounds twice more: the low-rank product and the sum.
    assert_close(got, want, "moe", reductions=REDUCTIONS, top_k=4)


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "mxfp8", "nvfp4"])
def test_quantize_with_the_modes_own_numbers(mode: str) -> None:
    moe = block(shared_width=WIDTH)
    mlx.nn.quantize(moe, mode=mode)
    assert mx.isfinite(moe(mx.random.normal((3, HIDDEN)))).all()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("tokens", [2, 100])
@pytest.mark.parametrize("index", [8, 100_000, -1])
def test_in_the_reference_a_route_to_no_expert_contributes_nothing(
    dtype: mx.Dtype, tokens: int, index: int
) -> None:
    def stack(out: int, into: int) -> Projection:
        return Projection((mx.random.normal((8, out, into)) * 0.1).astype(dtype))

    up, down = stack(WIDTH, HIDDEN), stack(HIDDEN, WIDTH)
    weights = ExpertWeights(gate=stack(WIDTH, HIDDEN), up=up, down=down)
    x = mx.random.normal((tokens, HIDDEN)).astype(dtype)
    good = mx.random.randint(0, 8, (tokens, 2))
    bad = mx.concatenate([good[:, :1], mx.full((tokens, 1), index, mx.int32)], axis=-1)
    y = switch_glu(x, weights, bad, backend="reference")
    assert mx.array_equal(y[:, 0], switch_glu(x, weights, good, backend="reference")[:, 0])
    assert not y[:, 1].any()


def test_a_prefill_copies_a_stack_piece_by_piece() -> None:
    """Half-precision stacks on a CPU: never all of it at once, let alone in float32."""
    stack = mx.random.normal((96, 1024, 1024)).astype(mx.bfloat16)
    weights = ExpertWeights(gate=Projection(stack), up=Projection(stack), down=Projection(stack))
    x = mx.random.normal((64, 1024)).astype(mx.bfloat16)
    indices = mx.random.randint(0, 96, (64, 4))
    with mx.stream(mx.cpu):
        mx.eval(stack, x, indices)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(switch_glu(x, weights, indices))
    assert mx.get_peak_memory() - before < stack.nbytes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Router(SPEC, HIDDEN, linear="logits"), "must not name a member of Router"),
        (lambda: nn.Router(SPEC, HIDDEN, selection_bias="selection_bias"), "must not name a member"),
        (lambda: block(names=nn.Names(experts="same", shared="same")), "names must differ"),
        (lambda: block(names=nn.Names(router="shard")), "names must differ"),
        (lambda: block(router=nn.Router(RouterSpec(num_experts=8, top_k=2), HIDDEN)), "must have spec"),
        (lambda: nn.MLP(HIDDEN, WIDTH, activation=Activation(name="relu2")), "activation must be gated"),
        (lambda: nn.SwitchGLU(HIDDEN, WIDTH, 8, Activation(name="relu2")), "activation must be gated"),
        (lambda: nn.SwitchLinear(HIDDEN, WIDTH, 8).to_quantized(mode="int4"), "mode must be one of"),
    ],
)
def test_refusals(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


WITHOUT_MLX_LM = """
import importlib.machinery as machinery, sys
find = machinery.PathFinder.find_spec
machinery.PathFinder.find_spec = staticmethod(
    lambda name, path=None, target=None: None if name.split(".")[0] == "mlx_lm" else find(name, path, target))
import mlx.core as mx, mlx.nn
from moefast import RouterSpec, nn
mx.set_default_device(mx.cpu)
x = mx.random.normal((50, 64))
for mode in ("", "affine", "mxfp4", "mxfp8", "nvfp4"):
    first, second = (nn.MoE(RouterSpec(num_experts=8, top_k=2), 64, 64, bias=True) for _ in range(2))
    for moe in (first, second):
        if mode:
            mlx.nn.quantize(moe, mode=mode)
        moe.eval()
    stack = first.switch_mlp.up_proj
    assert type(stack).__module__ == "moefast.nn.switch"
    assert (stack.num_experts, stack.output_dims, stack.input_dims) == (8, 64, 64)
    first.save_weights(sys.argv[1])
    second.load_weights(sys.argv[1])
    assert mx.array_equal(first(x), second(x))
    assert stack(x[:, None], mx.zeros((50,), mx.uint32)).shape == (50, 1, 64)
assert "mlx_lm" not in sys.modules
"""


def test_the_layers_work_without_mlx_lm(tmp_path: Any) -> None:
    command = [sys.executable, "-c", WITHOUT_MLX_LM, str(tmp_path / "weights.safetensors")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
