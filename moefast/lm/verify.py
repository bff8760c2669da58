"""What a checkpoint directory holds, established from its headers before any weight is read.

Everything here is about files: which tensors they hold, and that they hold them whole. Whether those are
the tensors of a model is asked in :mod:`moefast.lm.load`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import refuse

INDEX = "model.safetensors.index.json"
# What mlx-lm's loader reads; the index it does not look at.
WEIGHT_FILES = "model*.safetensors"

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.+)")


class Stored(NamedTuple):
    """A tensor in a file: the file's name, the shape, and the dtype in safetensors' words (``BF16``)."""

    file: str
    shape: tuple[int, ...]
    dtype: str


Tensors = Mapping[str, Stored]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not a JSON object.
    """
    if not path.is_file():
        raise FileNotFoundError(f"[load] {path.parent} must hold a {path.name}, got none.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        refuse("load", f"{path} must be valid JSON", error)
    if not isinstance(content, dict):
        refuse("load", f"{path} must be a JSON object", type(content).__name__)
    return content


def read_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor of the checkpoint in ``folder``; reads headers only.

    Raises:
        FileNotFoundError: there are no weights, or the index names a file that is not there.
        ValueError: a file is cut off or its header contradicts itself, a tensor is stored twice or is not
            in the file that the index names, or the experts of a layer are not alike.
    """
    files = sorted(folder.glob(WEIGHT_FILES))
    index = read_json(folder / INDEX).get("weight_map", {}) if (folder / INDEX).is_file() else {}
    if not isinstance(index, dict):
        refuse("load", f"weight_map of {folder / INDEX} must be a JSON object", type(index).__name__)
    absent = sorted({str(name) for name in index.values()} - {file.name for file in files})
    if absent:
        rule = f"{folder} must hold the {WEIGHT_FILES} that its index names"
        raise FileNotFoundError(f"[load] {rule}, got no {', '.join(absent)}.")
    if not files:
        raise FileNotFoundError(f"[load] {folder} must hold {WEIGHT_FILES}, got none.")
    tensors: dict[str, Stored] = {}
    for file in files:
        for name, stored in read_header(file).items():
            if name in tensors:
                rule = f"tensor {name!r} must be in one file of {folder}"
                refuse("load", rule, f"{tensors[name].file} and {file.name}")
            tensors[name] = stored
    for name, place in index.items():
        if name not in tensors or tensors[name].file != place:
            got = f"it in {tensors[name].file}" if name in tensors else "no such tensor"
            refuse("load", f"tensor {name!r} must be in {place}, as {INDEX} says", got)
    _check_scales(tensors)
    _check_experts(tensors)
    return tensors


def read_header(file: Path) -> dict[str, Stored]:
    """The tensors of one safetensors file.

    Raises:
        ValueError: the file is not as long as its header says, or the header is not valid.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as opened:
            slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: Stored(file.name, tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        refuse("load", f"{file} must be a whole safetensors file", _explain(file) or error)


def _explain(file: Path) -> str | None:
    """What is wrong with a file that safetensors refused, where that can be said better than it does:
    it names neither the lengths nor, mostly, the tensor."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if size < 8 or length > size - 8:
            return f"{size} bytes, which end within the header"
        try:
            header: dict[str, Any] = json.loads(opened.read(length))
            header.pop("__metadata__", None)
            entries = [(*map(int, e["data_offsets"]), name, e) for name, e in header.items()]
            end = 0
            for start, stop, name, entry in sorted(entries, key=lambda found: found[:2]):
                if start != end:
                    return f"tensor {name!r} at byte {start} of the data, where {end} is next"
                bits = _bits(entry["dtype"]) * math.prod(entry["shape"])
                if (stop - start) * 8 != bits:
                    form = f"{entry['dtype']} {entry['shape']}"
                    return f"tensor {name!r} of {stop - start} bytes, where {form} takes {bits / 8:g}"
                end = stop
        except (ValueError, TypeError, KeyError, AttributeError):
            return None
    if size != 8 + length + end:
        return f"{size} bytes, where the header promises {8 + length + end}"
    return None


def _bits(dtype: str) -> int:
    """``F32`` -> 32, ``BF16`` -> 16, ``F8_E4M3`` -> 8, ``BOOL`` -> 8. Raises ValueError for no dtype."""
    if dtype == "BOOL":
        return 8
    found = re.fullmatch(r"(?:BF|[FIUC])(\d+)(?:_E\d+M\d+\w*)?", dtype)
    if found is None:
        raise ValueError(dtype)
    return int(found[1])


def _check_scales(tensors: Tensors) -> None:
    """mlx-lm takes a layer for a quantized one where its scales are there: without them, it would find fault
    with all but what is missing."""
    for name, stored in tensors.items():
        layer, _, part = name.rpartition(".")
        packed = part == "biases" or (part == "weight" and stored.dtype == "U32")
        if packed and f"{layer}.scales" not in tensors:
            rule = f"tensor '{layer}.scales' must be there: {name!r} in {stored.file} is quantized"
            refuse("load", rule, "none")


def _check_experts(tensors: Tensors) -> None:
    """Experts stored one by one are stacked on loading: each must have what the others have."""
    blocks: dict[str, dict[str, dict[int, str]]] = {}
    for name in tensors:
        if found := _EXPERT.fullmatch(name):
            block, expert, part = found.groups()
            blocks.setdefault(block, {}).setdefault(part, {})[int(expert)] = name
    for block, parts in blocks.items():
        experts = set().union(*parts.values())
        for part, names in parts.items():
            one = tensors[next(iter(names.values()))]
            for expert in sorted(experts):
                if expert not in names:
                    rule = f"tensor '{block}.{expert}.{part}' must be there: other experts have theirs"
                    refuse("load", rule, f"none; the others are in {one.file}")
                stored = tensors[names[expert]]
                if stored[1:] != one[1:]:
                    rule = f"tensor {names[expert]!r} in {stored.file} must be like other experts' {one[1:]}"
                    refuse("load", rule, stored[1:])
