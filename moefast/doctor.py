"""``moefast doctor``: what is installed, what can run here, and what ``auto`` would choose.

The first thing to attach to a bug report. Needs no extra.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from .backends import backends, metal, native, registry
from .env import Settings, settings
from .machine import release_of
from .ops.experts import _problem as _experts_problem
from .ops.moe import _problem as _moe_problem
from .ops.quantized_matmul import _problem as _matmul_problem
from .ops.route import _problem as _route_problem
from .paths import kernels_dir
from .registry import Problem, device_name
from .specs import QuantSpec, RouterSpec
from .weights import ExpertWeights, Projection, SharedExpert

_PACKAGES = ("moefast", "mlx", "mlx-metal", "mlx-cpu", "mlx-lm", "numpy", "transformers")

# The layer that stands for all: of Qwen1.5-MoE-A2.7B, at 4 bits in bfloat16.
_LAYER = "Qwen1.5-MoE-A2.7B layer, 4 bits in groups of 64, bfloat16"
_HIDDEN, _WIDTH, _SHARED_WIDTH = 2048, 1408, 5632
_SPEC = RouterSpec(num_experts=60, top_k=4)
_TOKENS = {"decode": 1, "band": 16, "prefill": 512}


def examine() -> dict[str, Any]:
    """Everything ``moefast doctor`` prints; JSON can hold it.

    Returns:
        ``versions``: package -> version or None. ``platform``: system, machine, CPU count, memory in bytes.
        ``device``: MLX's default device and what it says of itself. ``backends``: name -> None where it
        can run, else the reason. ``default_backend``. ``auto``: op -> phase -> backend and the reasons
        of those refused. ``problem``: what is wrong with MOEFAST_BACKEND, or None. ``environment``:
        variable -> value in effect and whether it is the default.
        ``kernels``: the folder of Metal sources, or why there is none. ``native``: what that backend runs
        through, its instruction set and threads, and what it was built for; empty where it cannot run.
        ``metal``: the verdict of the kernels' self-check on this GPU, made now if there is none for this MLX
        yet; empty where they do not run on a GPU.
    """
    default, problem = "auto", None
    try:
        default = registry.default
    except ValueError as error:  # this command is what one runs to find out
        problem = str(error)
    return {
        "versions": {"python": platform.python_version(), **{name: release_of(name) for name in _PACKAGES}},
        "platform": {
            "system": platform.platform(),
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        },
        "device": {
            "default": str(mx.default_device()),
            "metal": mx.metal.is_available(),
            **{key: value for key, value in mx.device_info().items() if isinstance(value, str | int)},
        },
        "backends": dict(backends()),
        "native": native.describe(),
        "metal": metal.describe(),
        "default_backend": default,
        "problem": problem,
        "auto": _choices(default),
        "environment": _environment(),
        "kernels": _kernels(),
    }


def _kernels() -> str:
    try:
        return str(kernels_dir())
    except FileNotFoundError as error:
        return str(error)


def _environment() -> dict[str, dict[str, Any]]:
    """The settings in effect, under the names of the variables that set them."""
    defaults = asdict(Settings())
    return {
        Settings.variable(name): {"value": value, "default": value == defaults[name]}
        for name, value in asdict(settings).items()
    }


def _choices(default: str) -> dict[str, dict[str, dict[str, Any]]]:
    """op -> phase -> the backend that the default stands for, and why those before it refused."""
    chosen: dict[str, dict[str, dict[str, Any]]] = {}
    for phase, tokens in _TOKENS.items():
        for problem in _problems(tokens):
            chosen.setdefault(problem.op, {})[phase] = _choice(problem, default)
    return chosen


def _choice(problem: Problem, default: str) -> dict[str, Any]:
    taker, refused = registry.ask(problem, default)
    return {"backend": taker and taker.name, "refused": refused}


def _problems(tokens: int) -> list[Problem]:
    """Every operation on the representative layer. Its weights are never evaluated: they take no memory."""
    x, logits, device = (tokens, _HIDDEN), (tokens, _SPEC.num_experts), device_name()
    routes = ((tokens, _SPEC.top_k), mx.uint32)
    gate, up, down = _projections(_WIDTH, _SPEC.num_experts)
    layout = ExpertWeights(gate=gate, up=up, down=down).layout
    gate, up, down = _projections(_SHARED_WIDTH)
    shared = SharedExpert(gate=gate, up=up, down=down)
    dtype = mx.bfloat16
    return [
        _route_problem(logits, dtype, _SPEC, None, None, device),
        _experts_problem("switch_glu", x, dtype, layout, routes, None, None, device),
        _experts_problem("experts", x, dtype, layout, routes, (routes[0], dtype), None, device),
        _moe_problem(x, dtype, logits, dtype, _SPEC, layout, shared.layout, None, None, None, device),
        _matmul_problem("quantized_matmul", x, dtype, (shared.up.layout,), device),
    ]


def _projections(width: int, *stack: int) -> tuple[Projection, Projection, Projection]:
    """Gate, up and down."""
    quant = QuantSpec()

    def projection(out_dims: int, in_dims: int) -> Projection:
        scales = mx.zeros((*stack, out_dims, in_dims // quant.group_size), mx.bfloat16)
        packed = mx.zeros((*stack, out_dims, in_dims * quant.bits // 32), mx.uint32)
        return Projection(packed, scales, scales, quant=quant)

    return projection(width, _HIDDEN), projection(width, _HIDDEN), projection(_HIDDEN, width)


def as_text(found: dict[str, Any]) -> str:
    """What :func:`examine` found, for people."""
    machine = found["platform"]
    sections = [
        ("versions", {name: value or "not installed" for name, value in found["versions"].items()}),
        ("platform", {**machine, "memory_bytes": f"{machine['memory_bytes'] / 2**30:.1f} GiB"}),
        ("device", found["device"]),
        ("backends", {name: reason or "available" for name, reason in found["backends"].items()}),
        (
            "environment",
            {
                name: f"{entry['value']}{' (default)' if entry['default'] else ''}".strip()
                for name, entry in found["environment"].items()
            },
        ),
        ("kernels", {"folder": found["kernels"]}),
    ]
    if found["native"]:
        sections.insert(4, ("native", found["native"]))
    if found["metal"]:
        sections.insert(4, ("metal", _flat(found["metal"])))
    blocks = [f"{title}\n{_rows(rows)}" for title, rows in sections]
    if found["problem"]:
        blocks.append(f"problem\n  {found['problem']}")
    return "\n\n".join([*blocks, _auto_text(found)]) + "\n"


def _flat(verdict: dict[str, Any]) -> dict[str, Any]:
    """A verdict with a row for each part that failed."""
    failed: dict[str, str] = verdict["failed"]
    rows = {key: value for key, value in verdict.items() if key != "failed"}
    return {**rows, **{f"not {part}": reason for part, reason in failed.items()}}


def _rows(rows: dict[str, Any]) -> str:
    wide = max(map(len, rows))
    return "\n".join(f"  {name.removesuffix('_bytes'):{wide}}  {value}" for name, value in rows.items())


def _auto_text(found: dict[str, Any]) -> str:
    chosen: dict[str, dict[str, dict[str, Any]]] = found["auto"]
    lines = [f"what backend={found['default_backend']!r} picks ({_LAYER})"]
    lines.append(f"  {'':16}" + "".join(f"  {phase:10}" for phase in _TOKENS))
    for op, by_phase in chosen.items():
        lines.append(f"  {op:16}" + "".join(f"  {by_phase[p]['backend'] or 'none':10}" for p in _TOKENS))
    reasons = {
        f"  {op}: not {name}: {reason}"
        for op, by_phase in chosen.items()
        for choice in by_phase.values()
        for name, reason in choice["refused"].items()
        if found["backends"].get(name) is None  # what cannot run at all is said above
    }
    return "\n".join([*lines, *sorted(reasons)])


def run(*, as_json: bool) -> int:
    """Print the findings to stdout. Returns 1 where a setting is wrong, else 0."""
    found = examine()
    print(json.dumps(found, indent=2) if as_json else as_text(found), end="\n" if as_json else "")
    return 1 if found["problem"] else 0
