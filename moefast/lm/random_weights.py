"""Seeded random values for every parameter of a model, drawn directly in the format they are stored in.

A quantized matrix is never drawn as floats and packed: its words are random bits, and its scales (and
offsets) are such that what they mean has zero mean and a standard deviation of about ``1 / sqrt(in)``, as
the weights of a trained model have. That takes a second per two gigabytes, and no more memory than the
result.

Every module has a generator of its own, seeded by its path: a layer's values do not depend on which other
layers are drawn, or in what order.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_unflatten

from ..errors import refuse
from ..specs import FLOAT_DTYPES, QuantSpec

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

# Elements drawn at a time: they stay in the cache while they are converted.
_CHUNK = 1 << 17

# Standard deviation of output biases and selection biases: enough to change some choices of experts,
# too little to decide them.
_BIAS_STD = 0.02

# NumPy has no bfloat16: its values are kept as the upper halves of float32 words.
_STORAGE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16}
_MLX = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}

# Root mean square of the values of fp4 (e2m1) when all codes are equally likely.
_E2M1_RMS = math.sqrt(np.mean(np.square([0, 0.5, 1, 1.5, 2, 3, 4, 6])))
# What MLX divides an nvfp4 global scale by: the largest e4m3 value times the largest e2m1 value.
_NVFP4_RANGE = 448.0 * 6.0


class Parameter(NamedTuple):
    """One array of a module: its name within the module, its shape, and how it is stored:
    ``float32``, ``float16``, ``bfloat16``, ``uint32`` (packed words) or ``uint8`` (scales)."""

    name: str
    shape: Shape
    dtype: str

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        return math.prod(self.shape) * (np.dtype(_STORAGE.get(self.dtype, self.dtype)).itemsize)


class Leaf(NamedTuple):
    """The parameters a module holds itself, and how its ``weight`` is packed (None: it is not)."""

    path: str
    parameters: tuple[Parameter, ...]
    quant: QuantSpec | None

    @property
    def nbytes(self) -> int:
        """Bytes of all its parameters."""
        return sum(p.nbytes for p in self.parameters)

    @property
    def num_weights(self) -> int:
        """Numbers its parameters stand for: a packed weight counts its logical elements."""
        shapes = {p.name: p.shape for p in self.parameters}
        if self.quant is None:
            return sum(math.prod(shape) for shape in shapes.values())
        extra = math.prod(shapes["bias"]) if "bias" in shapes else 0
        return math.prod(shapes["weight"]) * 32 // self.quant.bits + extra


def leaves_of(model: mlx.nn.Module, dtype: str) -> list[Leaf]:
    """What ``model`` holds, module by module; looks at shapes and dtypes and evaluates nothing.

    Args:
        model: with the parameter tree to describe; quantized or not.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for every float parameter but those that the
            model's ``cast_predicate`` keeps in float32.

    Raises:
        ValueError: no such dtype.
    """
    if dtype not in FLOAT_DTYPES:
        refuse("random_parameters", f"dtype must be one of {FLOAT_DTYPES}", repr(dtype))
    follows: Callable[[str], bool] = getattr(model, "cast_predicate", lambda path: True)
    modules = dict(model.named_modules())
    held: dict[str, list[Parameter]] = {}
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for path, value in parameters.items():
        module, _, name = path.rpartition(".")
        if mx.issubdtype(value.dtype, mx.floating):
            stored = dtype if follows(path) and name != "global_scale" else "float32"
        else:
            stored = str(value.dtype).removeprefix("mlx.core.")
        held.setdefault(module, []).append(Parameter(name, value.shape, stored))
    return [Leaf(path, tuple(found), _quant_of(modules.get(path), found)) for path, found in held.items()]


def _quant_of(module: Any, found: list[Parameter]) -> QuantSpec | None:
    if not any(p.name == "scales" for p in found):
        return None
    return QuantSpec(bits=module.bits, group_size=module.group_size, mode=module.mode)


def draw(leaf: Leaf, seed: int) -> dict[str, Array]:
    """The values of one module: name within the module -> array.

    bfloat16 arrays come as uint16 words (:func:`to_mlx` reads them); all others in their own dtype.
    """
    entropy = np.random.SeedSequence([seed, zlib.crc32(leaf.path.encode())])
    rng = np.random.Generator(np.random.SFC64(entropy))
    by_name = {p.name: p for p in leaf.parameters}
    values: dict[str, Array] = {}
    if leaf.quant is not None:
        values = _packed(by_name, leaf.quant, rng)
    for name, p in by_name.items():
        if name in values:
            continue
        if name != "weight":
            values[name] = _uniform(p, _BIAS_STD, rng)
        elif len(p.shape) == 1:  # of a norm
            values[name] = _store(np.ones(p.shape, np.float32), p.dtype)
        else:
            values[name] = _uniform(p, 1 / math.sqrt(p.shape[-1]), rng)
    return values


def to_mlx(value: Array, dtype: str) -> mx.array:
    """An array of :func:`draw` as MLX holds it."""
    array = mx.array(value)
    return array.view(mx.bfloat16) if dtype == "bfloat16" else array


def random_parameters(model: mlx.nn.Module, *, seed: int = 0, dtype: str = "bfloat16") -> None:
    """Replace every parameter of a built model, quantized or not, by seeded random values.

    The former parameters are not evaluated: a model just built, and even one just quantized, costs no
    time and no memory before this.

    Args:
        model: changed in place. Norms become 1; matrices, packed or not, get zero mean and a standard
            deviation of about ``1 / sqrt(in)``; biases 0.02.
        seed: equal seeds give equal parameters.
        dtype: ``float32``, ``float16`` or ``bfloat16``, for all float parameters (scales included) but
            those that the model's ``cast_predicate`` keeps in float32.

    Raises:
        ValueError: no such dtype.
    """
    for leaf in leaves_of(model, dtype):
        stored = {p.name: p.dtype for p in leaf.parameters}
        prefix = f"{leaf.path}." if leaf.path else ""
        fresh = [(prefix + name, to_mlx(v, stored[name])) for name, v in draw(leaf, seed).items()]
        model.update(tree_unflatten(fresh))


def _uniform(p: Parameter, std: float, rng: np.random.Generator) -> Array:
    """Uniform values of zero mean; drawn in float32, a chunk at a time, and converted in place."""
    out = np.empty(p.shape, _STORAGE[p.dtype])
    flat = out.reshape(-1)
    buffer = np.empty(min(_CHUNK, flat.size), np.float32)
    for start in range(0, flat.size, _CHUNK):
        part = buffer[: min(_CHUNK, flat.size - start)]
        rng.random(out=part, dtype=np.float32)
        part -= 0.5
        part *= std * math.sqrt(12)
        flat[start : start + part.size] = _store(part, p.dtype)
    return out


def _store(values: npt.NDArray[np.float32], dtype: str) -> Array:
    """float32 values in the storage of ``dtype``. bfloat16 truncates: rounding random numbers is vain."""
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(_STORAGE[dtype], copy=False)


def _load(values: Array, dtype: str) -> npt.NDArray[np.float32]:
    """The inverse of :func:`_store`."""
    if dtype == "bfloat16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _packed(by_name: dict[str, Parameter], quant: QuantSpec, rng: np.random.Generator) -> dict[str, Array]:
    """``weight``, ``scales`` and what else gives a quantized matrix its values."""
    scales = by_name["scales"]
    in_dims = scales.shape[-1] * quant.group_size
    std = 1 / math.sqrt(in_dims)
    values = {"weight": _words(by_name["weight"].shape, quant, rng)}
    if quant.mode == "affine":
        levels = 2**quant.bits - 1
        step = std / math.sqrt(levels * (levels + 2) / 12)  # all codes are equally likely
        # MLX's own scales differ from group to group, and have either sign: here +-(0.75 to 1.25) steps.
        size = rng.random(scales.shape, np.float32) - np.float32(0.5)
        size += np.copysign(np.float32(0.75), size)
        size *= np.float32(step)
        values["scales"] = _store(size, scales.dtype)
        offsets = _load(values["scales"], scales.dtype) * np.float32(-levels / 2)
        values["biases"] = _store(offsets, by_name["biases"].dtype)
        return values
    target = std / (_E2M1_RMS if quant.bits == 4 else float(np.sqrt(np.mean(_e4m3() ** 2))))
    if quant.mode == "nvfp4":
        if "global_scale" in by_name:  # then the groups' scales can be of middling size
            p = by_name["global_scale"]
            values["global_scale"] = np.full(p.shape, target * _NVFP4_RANGE, np.float32)
            target = 1.0
        wanted = rng.uniform(0.75 * target, 1.25 * target, scales.shape)
        values["scales"] = np.searchsorted(_e4m3(), wanted).clip(1, 126).astype(np.uint8)
    else:  # a power of two; the exponent's bias is 127
        exponent = math.floor(math.log2(target)) + 127
        values["scales"] = rng.integers(exponent, exponent + 2, scales.shape, dtype=np.uint8)
    return values


def _e4m3() -> npt.NDArray[np.float64]:
    """The 127 finite values of fp8 (e4m3) without sign, by code."""
    code = np.arange(127)
    exponent, mantissa = code >> 3, code & 7
    return np.where(exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent - 10))


def _words(shape: Shape, quant: QuantSpec, rng: np.random.Generator) -> Array:
    """Random packed words, uint32 of ``shape``."""
    size = math.prod(shape)
    words = np.empty((size + 1) // 2, np.uint64)
    for start in range(0, words.size, _CHUNK):
        part = words[start : start + _CHUNK]
        part[:] = rng.bit_generator.random_raw(part.size)
        if quant.mode == "mxfp8":
            codes = part.view(np.uint8)
            codes[(codes & 0x7F) == 0x7F] ^= 1  # NaN becomes the largest finite value
    return words.view(np.uint32)[:size].reshape(shape)
