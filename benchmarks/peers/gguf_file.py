"""A model of moefast's as a GGUF file, for llama.cpp: the same weights, as near as its formats come."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import mlx.core as mx
import numpy as np
import numpy.typing as npt
from gguf.quants import quantize
from gguf_names import ARCHITECTURES, Architecture, Config
from mlx.utils import tree_flatten

Array = npt.NDArray[Any]

# What the matrices become. q4_0 is llama.cpp's fastest, 4.5 bits a weight like 4 bits in groups of 64 here,
# but without offsets: values are quantized anew. q4_1 holds exactly the same values, in 5 bits. f32 is for
# comparing results.
FORMATS = {
    "q4_0": gguf.GGMLQuantizationType.Q4_0,
    "q4_1": gguf.GGMLQuantizationType.Q4_1,
    "f32": gguf.GGMLQuantizationType.F32,
}
FLOAT32 = gguf.GGMLQuantizationType.F32
_BLOCK = 32
# Matrices that llama.cpp only takes in float32.
_ROUTERS = "ffn_gate_inp"
# Values converted at a time.
_CHUNK = 1 << 24


class Matrix(NamedTuple):
    """One weight of the model: floats, or packed words with their scales and offsets.

    Attributes:
        weight, scales, biases: as MLX has them, the latter two None for floats.
        bits, group_size: of packed words.
    """

    weight: mx.array
    scales: mx.array | None = None
    biases: mx.array | None = None
    bits: int = 0
    group_size: int = 0

    def take(self, rows: Any) -> Matrix:
        """Some rows, by slice or by an array of them: along the last axis but one, or the only one."""

        def of(array: mx.array | None) -> mx.array | None:
            if array is None:
                return None
            return array[rows] if array.ndim == 1 else array[..., rows, :]

        return self._replace(weight=of(self.weight), scales=of(self.scales), biases=of(self.biases))

    def expert(self, index: int) -> Matrix:
        """One matrix of a stack."""
        weight, scales, biases = (
            a if a is None else a[index] for a in (self.weight, self.scales, self.biases)
        )
        return self._replace(weight=weight, scales=scales, biases=biases)

    def values(self) -> Array:
        """In float32."""
        value = self.weight.astype(mx.float32) if self.scales is None else self._dequantized()
        return np.asarray(value)

    def _dequantized(self) -> mx.array:
        assert self.scales is not None
        assert self.biases is not None
        scales, biases = self.scales.astype(mx.float32), self.biases.astype(mx.float32)
        return mx.dequantize(self.weight, scales, biases, group_size=self.group_size, bits=self.bits)

    def q4_1(self) -> Array:
        """Blocks of 32 codes with a scale and an offset in float16, ``[rows, blocks * 20]`` bytes."""
        assert self.scales is not None
        assert self.biases is not None
        nibbles = np.asarray(self.weight).view(np.uint8)
        codes = np.stack([nibbles & 15, nibbles >> 4], axis=-1).reshape(nibbles.shape[0], -1, 2, _BLOCK // 2)
        packed = codes[:, :, 0] | codes[:, :, 1] << 4
        both = [
            np.repeat(np.asarray(a.astype(mx.float16)), self.group_size // _BLOCK, axis=-1)
            for a in (self.scales, self.biases)
        ]
        head = np.stack(both, axis=-1).view(np.uint8)
        return np.concatenate([head, packed], axis=-1).reshape(nibbles.shape[0], -1)


def save(path: Path, model: Any, config: Config, form: str) -> None:
    """Write a model of one of the five families, in 4 bits or unquantized.

    Args:
        path: of the file.
        model: filled with weights.
        config: what it was made from.
        form: a key of ``FORMATS``.
    """
    architecture = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, architecture.name, use_temp_file=True)
    writer.add_string("tokenizer.ggml.model", "none")
    for key, value in keys_of(architecture, config):
        add: Any = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}[type(value)]
        add(f"{architecture.name}.{key}", value)
    for name, matrix in tensors_of(model, architecture, config):
        whole = matrix.weight.ndim == 1 or name.split(".")[-2].startswith(_ROUTERS)
        kind = FLOAT32 if whole else FORMATS[form]
        writer.add_tensor(name, converted(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def keys_of(architecture: Architecture, config: Config) -> Iterator[tuple[str, Any]]:
    """Keys without their prefix, and values."""
    heads = config[architecture.keys["attention.head_count"]]
    for key, field in architecture.keys.items():
        value = field_of(config, field)
        yield key, float(value) if key in _FLOATS else value
    yield from architecture.fixed.items()
    head_dim = config.get("head_dim") or config[architecture.keys["embedding_length"]] // heads
    yield "rope.dimension_count", int(head_dim * config.get("partial_rotary_factor", 1.0))


def field_of(config: Config, field: str) -> Any:
    """A field of a configuration, by its dotted path."""
    return reduce(lambda inside, part: inside[part], field.split("."), config)


# Keys that are floats even where the configuration has an integer.
_FLOATS = frozenset(
    ("rope.freq_base", "attention.clamp_kqv", "expert_weights_scale", "logit_scale", "embedding_scale")
)


def tensors_of(model: Any, architecture: Architecture, config: Config) -> Iterator[tuple[str, Matrix]]:
    """llama.cpp's tensors by name, with their rows in its order."""
    modules = dict(model.named_modules())
    parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    heads = {"attn_q": config[architecture.keys["attention.head_count"]]}
    heads["attn_k"] = heads["attn_v"] = field_of(config, architecture.keys["attention.head_count_kv"])
    for parameter, value in parameters.items():
        path, _, part = parameter.rpartition(".")
        matrix = Matrix(value)
        if f"{path}.scales" in parameters and part != "bias":
            if part != "weight":
                continue  # comes with the weight
            of, module = parameters.__getitem__, modules[path]
            matrix = Matrix(value, of(f"{path}.scales"), of(f"{path}.biases"), module.bits, module.group_size)
        prefix, names = named(architecture, path, part)
        for name, rows in zip(names, split(value.shape[0], names, heads), strict=True):
            size = len(rows)
            if architecture.interleaved and name in ("attn_q", "attn_k"):
                # Each head's second half, the other half of every pair, between its first.
                rows = rows.reshape(heads[name], 2, -1).swapaxes(1, 2).reshape(size)
            whole = size == value.shape[0] and bool(np.all(rows[1:] > rows[:-1]))
            suffix = "" if "." in name else f".{part}"
            yield f"{prefix}{name}{suffix}", matrix if whole else matrix.take(mx.array(rows))


def named(architecture: Architecture, path: str, part: str) -> tuple[str, tuple[str, ...]]:
    """A parameter's prefix and names in llama.cpp."""
    inside = re.fullmatch(rf"{re.escape(architecture.layers)}\.(\d+)\.(.+)", path)
    if inside is None:
        return "", (architecture.outer[path],)
    layer, module = inside.groups()
    names = architecture.inner.get(f"{module}.{part}") or architecture.inner.get(module)
    if names is None:
        raise ValueError(
            f"[peers] llama.cpp's {architecture.name} must have every part, got {module}.{part}."
        )
    return f"blk.{layer}.", (names,) if isinstance(names, str) else names


def split(rows: int, names: Sequence[str], heads: Mapping[str, int]) -> list[Array]:
    """Rows of each name: in proportion to their heads, where there are several."""
    if len(names) == 1:
        return [np.arange(rows)]
    ends = np.cumsum([heads[name] for name in names])
    return np.split(np.arange(rows), rows * ends[:-1] // ends[-1])


def converted(matrix: Matrix, kind: Any) -> Array:
    """Values in one of llama.cpp's types: floats, or bytes ``[..., rows, bytes of a row]``."""
    weight = matrix.weight
    if weight.ndim == 3:  # one expert after another, so that only one is held in float32
        return np.stack([converted(matrix.expert(e), kind) for e in range(weight.shape[0])])
    if kind == FORMATS["q4_1"] and matrix.bits == 4:
        return matrix.q4_1()
    values = matrix.values()
    if kind == FLOAT32:
        return values.reshape(-1) if values.shape[0] == 1 else values
    parts = np.array_split(values, max(1, values.size // _CHUNK))
    return np.concatenate([quantize(part, kind) for part in parts])
