"""MLX's element-wise kernels: unary and binary operations, comparisons and copies to another type."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from mlx_kernels import ROUNDOFF, Run, normal, numbers, of, out, scalar

from moefast import emulator

# Names of MLX's operations, and what they are.
UNARY = {
    **{
        name.capitalize(): getattr(np, name)
        for name in ("sin", "cos", "tan", "sinh", "cosh", "tanh", "exp", "expm1", "abs")
    },
    **{name.capitalize(): getattr(np, name) for name in ("floor", "ceil", "square", "sign", "negative")},
    **{name.capitalize(): getattr(np, name) for name in ("sqrt", "log", "log2", "log10", "log1p")},
    **{f"Arc{name.capitalize()}": getattr(np, f"arc{name}") for name in ("sin", "cos", "tan")},
    **{f"Arc{name.capitalize()}": getattr(np, f"arc{name}") for name in ("sinh", "cosh", "tanh")},
    "Round": np.rint,
    "Rsqrt": lambda x: 1 / np.sqrt(x),
    "Sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "Erf": np.vectorize(math.erf),
    "ErfInv": np.vectorize(lambda x: NormalDist().inv_cdf((x + 1) / 2) / 2**0.5),
}
# Of which numbers, where not of all.
DOMAINS = {
    **dict.fromkeys(("Sqrt", "Log", "Log2", "Log10", "Log1p", "Rsqrt"), lambda x: np.abs(x) + 0.1),
    **dict.fromkeys(("ArcSin", "ArcCos", "ArcTanh", "ErfInv"), lambda x: 0.9 * np.tanh(x)),
    "ArcCosh": lambda x: np.abs(x) + 1.1,
}
# MLX's expm1f reduces its argument in one step: 1.4e-6 for each power of two are lost. erf calls it.
LESS_EXACT = {"Expm1": 2.0**-15, "Erf": 2.0**-19}


def unary(kind: str, name: str, size: int) -> Run:
    x = of(kind, DOMAINS.get(name, lambda x: x)(2 * normal(size)))
    return Run(
        ("unary_ops.h", "unary.h"),
        f'instantiate_kernel("k", unary_v, {kind}, {kind}, {name})',
        {"in": x, "out": out(kind, size), "size": scalar(size, np.uint32)},
        (size, 1, 1),
        (min(size, 1024), 1, 1),
        "out",
        kind,
        UNARY[name](numbers(x, kind)),
        max(8 * ROUNDOFF[kind], LESS_EXACT.get(name, 0)),
    )


BINARY = {
    "Add": np.add,
    "Subtract": np.subtract,
    "Multiply": np.multiply,
    "Divide": np.divide,
    "FloorDivide": np.floor_divide,
    "Remainder": np.mod,
    "Maximum": np.maximum,
    "Minimum": np.minimum,
    "Power": np.power,
    "LogAddExp": np.logaddexp,
    "ArcTan2": np.arctan2,
}
COMPARISONS = {
    "Equal": np.equal,
    "NotEqual": np.not_equal,
    "Greater": np.greater,
    "GreaterEqual": np.greater_equal,
    "Less": np.less,
    "LessEqual": np.less_equal,
}


def binary(kind: str, name: str, size: int) -> Run:
    a, b = normal(size), normal(size, seed=1)
    if name == "Power":
        a = np.exp2(np.tanh(a))
    if name in ("FloorDivide", "Remainder"):  # not at a jump, where a rounding decides
        b = np.copysign(2.0 ** np.round(b), b)
    return _binary(kind, name, of(kind, a), of(kind, b), kind)


def comparison(kind: str, name: str, size: int) -> Run:
    """Of numbers that often are equal."""
    a, b = np.round(normal(size)), np.round(normal(size, seed=1))
    return _binary(kind, name, of(kind, a), of(kind, b), "bool")


def _binary(kind: str, name: str, a: np.ndarray, b: np.ndarray, result: str) -> Run:
    size = a.size
    compares = result == "bool"
    exact = (COMPARISONS if compares else BINARY)[name](numbers(a, kind), numbers(b, kind))
    return Run(
        ("binary_ops.h", "binary.h"),
        f'instantiate_kernel("k", binary_vv, {kind}, {result}, {name})',
        {
            "a": a,
            "b": b,
            "c": emulator.Output((size,), np.bool_) if compares else out(kind, size),
            "size": scalar(size, np.uint32),
        },
        (size, 1, 1),
        (min(size, 1024), 1, 1),
        "c",
        result,
        exact.astype(np.float64),
        0.0 if compares else 4 * ROUNDOFF[kind],
    )


def cast(source: str, kind: str, size: int) -> Run:
    """A copy to another type."""
    x = of(source, normal(size))
    return Run(
        ("copy.h",),
        f'instantiate_kernel("k", copy_v, {source}, {kind})',
        {"src": x, "dst": out(kind, size), "size": scalar(size, np.uint32)},
        (size, 1, 1),
        (min(size, 1024), 1, 1),
        "dst",
        kind,
        numbers(x, source),
        ROUNDOFF[kind],
    )
