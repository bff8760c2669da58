"""The native backend over a long life, and where memory ends: in processes of their own, whose size means
something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from marks import needs_native

pytestmark = needs_native

ROOT = Path(__file__).resolve().parents[1]


def run(program: str, *arguments: str) -> str:
    """What the program prints. It starts with :data:`LAYER`."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LAYER + program, *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT), "MOEFAST_BACKEND": "native"},
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


LAYER = """
import resource, sys
import moefast._build_info as info
if "numpy" in sys.argv:
    info.BUILT_FOR_MLX = "0.31.0"
import mlx.core as mx
from moefast import *
from moefast.backends import native
from moefast.ops import Rotation, add_rms_norm, attention, cached_attention, embed, rms_norm, rope

mx.set_default_device(mx.cpu)
assert ("numpy" in sys.argv) == (native.bindings().native is None)
spec, quant = RouterSpec(num_experts=4, top_k=2), QuantSpec(group_size=32)

def stack(*shape):
    return Projection(*mx.quantize(mx.random.normal(shape), **quant.mlx_arguments()), quant=quant)

def network(*experts, width=64):
    gate, up, down = stack(*experts, width, 64), stack(*experts, width, 64), stack(*experts, 64, width)
    return {"gate": gate, "up": up, "down": down}

weights, shared = ExpertWeights(**network(4)), SharedExpert(**network(), output_gate=stack(1, 64))
x, logits = mx.random.normal((3, 64)), mx.random.normal((3, 4))
heads = mx.random.normal((1, 4, 3, 64))
good, bad = (mx.array([[0, i]] * 3) for i in (1, 4))
held = [p.arrays[:3] for w in (weights, shared) for p in (w.gate, w.up, w.down)]
mx.eval(x, logits, heads, good, bad, held)

def size():
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most << 10
"""

CALLS = """
def wrong():
    try:
        mx.eval(switch_glu(x, weights, bad))
    except ValueError:
        return mx.zeros(1)
    raise AssertionError("an expert that is not there was taken")

CALLS = {
    "moe": lambda: moe(x, logits, spec, weights, shared=shared),
    "experts": lambda: experts(x, weights, Routing(good, mx.ones((3, 2)))),
    "switch_glu": lambda: switch_glu(x[:, ::1], weights, good),
    "strided": lambda: switch_glu(mx.broadcast_to(x.T[:, :1].T, (3, 64)), weights, good),
    "quantized_matmul": lambda: quantized_matmul(x, shared.up),
    "new weights": lambda: quantized_matmul(x, Projection(*shared.up.arrays[:3], quant=quant)),
    "route": lambda: route(logits, spec).weights,
    "attention": lambda: attention(heads, heads, heads, scale=0.1, causal=True),
    "rms_norm": lambda: rms_norm(x, None, 1e-6),
    "add_rms_norm": lambda: add_rms_norm(x, x, None, 1e-6, multiplier=0.22),
    "a norm without its sum": lambda: add_rms_norm(x, x, None, 1e-6)[1],
    "rope": lambda: rope(heads, dims=64, base=1e4, offset=3),
    "cached_attention": lambda: cached_attention(
        x[None], x[None], x[None], room, room, offset=2, rotation=turn, scale=0.1, causal=True
    ),
    "embed": lambda: embed(good, shared.up),
    "gradient": lambda: mx.grad(lambda x: moe(x, logits, spec, weights).sum())(x),
    "error": wrong,
}
room, turn = mx.zeros((1, 4, 9, 16)), Rotation(16, base=1e4)
mx.eval(room)
call, times = CALLS[sys.argv[1]], int(sys.argv[2])

def many(times):
    for _ in range(times):
        mx.eval(call())
    return size()

before = many(times // 5)
print(many(times) - before)
"""

# What the allocator of the C library takes at once, and gives to many.
_ROOM = 1 << 20


@pytest.mark.parametrize(
    ("call", "times", "binding"),
    [
        *(
            (call, 10_000, "primitives")
            for call in (
                "rms_norm",
                "add_rms_norm",
                "a norm without its sum",
                "rope",
                "cached_attention",
                "embed",
            )
        ),
        *(
            (call, 1_000 if call == "gradient" else 10_000, binding)
            for call in (
                "moe",
                "experts",
                "switch_glu",
                "strided",
                "quantized_matmul",
                "new weights",
                "route",
                "attention",
                "gradient",
                "error",
            )
            for binding in ("primitives", "numpy")
        ),
    ],
)
def test_many_calls_leave_nothing_behind(call: str, times: int, binding: str) -> None:
    grown = int(run(CALLS, call, str(times), binding))
    assert grown < _ROOM, f"{grown >> 10} kB"


WEIGHTS = """
mx.set_cache_limit(0)
wide = ExpertWeights(**network(4, width=4096))
dense = stack(8192, 512)
parts = [p.arrays[:3] for p in (*wide.projections, dense)]
few, many, rows = mx.random.normal((1, 64)), mx.random.normal((500, 64)), mx.random.normal((9, 512))
choice = mx.random.randint(0, 4, (500, 2))
mx.eval(parts, few, many, rows, choice)
for call in (
    lambda: switch_glu(few, wide, choice[:1]),
    lambda: experts(many, wide, Routing(choice, mx.ones((500, 2)))),
    lambda: quantized_matmul(rows, dense),
):
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(call())
    print(mx.get_peak_memory() - before)
"""


def test_weights_are_not_copied() -> None:
    """3.5 MB of experts and 2.6 MB of a dense weight: MLX allocates for what comes and goes, no more."""
    used = [int(line) for line in run(WEIGHTS, "primitives").split()]
    assert max(used) < _ROOM, used


NO_MEMORY = """
wide = ExpertWeights(**network(4, width=4096))
many = mx.random.normal((4000, 64))
choice, mix = mx.array([[0, 3]] * 4000), mx.ones((4000, 2))
want = experts(x, weights, Routing(good, mx.ones((3, 2))))
mx.eval(want, many, choice, mix, [p.arrays[:3] for p in wide.projections])
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = resource.getrlimit(resource.RLIMIT_AS)
resource.setrlimit(resource.RLIMIT_AS, (now + (40 << 20), limit[1]))
for _ in range(3):
    try:
        mx.eval(experts(many, wide, Routing(choice, mix)))
        print("ran")
    except Exception as error:
        print(type(error).__name__, error)
    assert mx.array_equal(experts(x, weights, Routing(good, mx.ones((3, 2)))), want)
resource.setrlimit(resource.RLIMIT_AS, limit)
print(experts(many, wide, Routing(choice, mix)).shape)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory")
@pytest.mark.parametrize("binding", ["primitives", "numpy"])
def test_without_memory_there_is_an_error_and_life_goes_on(binding: str) -> None:
    """The inner activations of 8000 routes by 4096 values are 131 MB; 40 are left."""
    *refused, last = run(NO_MEMORY, binding).splitlines()
    assert refused == ["MemoryError [experts] scratch memory must be available, got none."] * 3
    assert last == "(4000, 64)"
