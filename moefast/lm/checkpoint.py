"""Random checkpoints with the layout and the layer sizes of real ones: for tests, benchmarks and demos.

They are written in the layout that stock mlx-lm reads (DBRX with one matrix per expert), so the same files
load in mlx-lm and in moefast. A layer at a time is drawn and written: the memory needed is about one layer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import mlx.nn

from ..errors import refuse
from ..specs import MODE_DEFAULTS, QuantSpec
from .presets import Config, preset
from .random_weights import Leaf, draw, leaves_of, random_parameters
from .tokenizer import write_tokenizer

__all__ = ["Checkpoint", "init_model", "random_parameters"]

_LAYER = re.compile(r"\.(?:layers|blocks)\.(\d+)\.")
_INDEX = "model.safetensors.index.json"


class Checkpoint(NamedTuple):
    """What :func:`init_model` wrote.

    Attributes:
        path: the directory.
        num_parameters: logical numbers in it: a packed weight counts its elements.
        num_bytes: of the weights.
        num_files: safetensors files.
    """

    path: Path
    num_parameters: int
    num_bytes: int
    num_files: int


def init_model(
    family: str,
    out: str | os.PathLike[str],
    *,
    size: str = "tiny",
    bits: int | None = 4,
    group_size: int | None = None,
    mode: str = "affine",
    dtype: str = "bfloat16",
    seed: int = 0,
    force: bool = False,
) -> Checkpoint:
    """Write a checkpoint of random weights, with a working tokenizer.

    Args:
        family, size: see :func:`moefast.lm.preset`.
        out: the directory to make; it appears when it is complete, or not at all.
        bits: per weight; None or 16 for unquantized weights of ``dtype``.
        group_size: weights that share a scale; None for the default of ``mode``.
        mode: ``affine``, ``mxfp4``, ``mxfp8`` or ``nvfp4``. Layers that the model's ``quant_predicate``
            sets apart (8-bit routers) get what it asks for, and config.json says so.
        dtype: ``float32``, ``float16`` or ``bfloat16``, of float parameters and affine scales.
        seed: equal arguments give equal files.
        force: replace a checkpoint that ``out`` already holds.

    Raises:
        ValueError: an argument breaks a rule, ``out`` is taken, or its disk is too full.
    """
    if not isinstance(seed, int) or seed < 0:
        refuse("init_model", "seed must be a whole number of at least 0", repr(seed))
    config = preset(family, size)
    quant = _quant_spec(bits, group_size, mode)
    target = Path(out).expanduser().resolve()
    _check_target(target, force)
    leaves = _describe(config, quant, dtype)
    shards = _shards(leaves)
    num_bytes = sum(leaf.nbytes for leaf in leaves)
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if free < num_bytes:
        refuse("init_model", f"{target.parent} must have {num_bytes} bytes free", free)
    config["torch_dtype"] = dtype
    with _appearing(target, force) as partial:
        tokens = write_tokenizer(partial, config["vocab_size"])
        special = {"bos_token_id": tokens.bos, "eos_token_id": tokens.eos, "pad_token_id": tokens.pad}
        _write_json(partial / "config.json", dict(sorted({**config, **special}.items())))
        _write_json(partial / "generation_config.json", {"_from_model_config": True, **special})
        with _progress(num_bytes) as advance:
            _write_shards(partial, shards, seed, num_bytes, advance)
    num_parameters = sum(leaf.num_weights for leaf in leaves)
    return Checkpoint(target, num_parameters, num_bytes, len(shards))


def _quant_spec(bits: int | None, group_size: int | None, mode: str) -> QuantSpec | None:
    if bits is None or bits == 16:
        if mode != "affine" or group_size is not None:
            refuse("init_model", f"bits={bits} takes no mode and no group_size", f"{mode!r}, {group_size}")
        return None
    if mode not in MODE_DEFAULTS:
        refuse("init_model", f"mode must be one of {tuple(MODE_DEFAULTS)}", repr(mode))
    return QuantSpec(bits=bits, group_size=group_size or MODE_DEFAULTS[mode][1], mode=mode)


def default_bits(mode: str) -> int:
    """Bits per weight where none are asked for: 8 for mxfp8, else 4."""
    return MODE_DEFAULTS[mode][0] if mode in MODE_DEFAULTS else 4


def _describe(config: Config, quant: QuantSpec | None, dtype: str) -> list[Leaf]:
    """The modules of stock mlx-lm's model; adds its quantization to ``config``.

    mlx-lm builds and quantizes lazily: nothing is evaluated, and the model is gone on return.
    """
    module = import_module(f"mlx_lm.models.{config['model_type']}")
    model: mlx.nn.Module = module.Model(module.ModelArgs.from_dict(config))
    if quant is not None:
        _quantize(model, config, quant)
    return leaves_of(model, dtype)


def _quantize(model: mlx.nn.Module, config: Config, quant: QuantSpec) -> None:
    """Quantize as mlx_lm.convert does, and record what a layer gets beside the default."""
    asked: Callable[[str, Any], bool | dict[str, Any]] | None = getattr(model, "quant_predicate", None)
    recorded: dict[str, Any] = quant.mlx_arguments()

    def predicate(path: str, layer: Any) -> bool | dict[str, Any]:
        if not hasattr(layer, "to_quantized"):
            return False
        if layer.weight.shape[-1] % quant.group_size:
            return False  # mlx_lm.convert leaves such a layer as it is; so do its loader and ours
        answer = True if asked is None else asked(path, layer)
        if isinstance(answer, dict):
            recorded[path] = answer
        return answer

    mlx.nn.quantize(model, **quant.mlx_arguments(), class_predicate=predicate)
    config["quantization"] = recorded
    # Written twice, as mlx-lm does: the model hub reads the second.
    config["quantization_config"] = recorded


def _shards(leaves: list[Leaf]) -> list[list[Leaf]]:
    """One file per layer, after one with what belongs to none (embedding, last norm, head)."""
    by_layer: dict[int, list[Leaf]] = {}
    for leaf in leaves:
        found = _LAYER.search(f"{leaf.path}.")
        by_layer.setdefault(int(found[1]) if found else -1, []).append(leaf)
    return [by_layer[layer] for layer in sorted(by_layer)]


def _write_shards(
    folder: Path, shards: list[list[Leaf]], seed: int, num_bytes: int, advance: Callable[[int], None]
) -> None:
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(_write_shard(folder / name, shard, seed, advance), name)
    metadata = {
        "total_parameters": sum(leaf.num_weights for shard in shards for leaf in shard),
        "total_size": num_bytes,
    }
    _write_json(folder / _INDEX, {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _write_shard(path: Path, shard: list[Leaf], seed: int, advance: Callable[[int], None]) -> list[str]:
    """Draw the modules of one file and write it; returns the names of its tensors."""
    from safetensors import TensorSpec, serialize_file

    arrays: list[Any] = []  # what the specs point into
    specs: dict[str, TensorSpec] = {}
    for leaf in shard:
        values = draw(leaf, seed)
        for p in leaf.parameters:
            value = values[p.name]
            arrays.append(value)
            specs[f"{leaf.path}.{p.name}"] = TensorSpec(
                dtype=p.dtype, shape=value.shape, data_ptr=value.ctypes.data, data_len=value.nbytes
            )
        advance(leaf.nbytes // 2)  # drawn; the other half when it is written
    serialize_file(specs, path, metadata={"format": "mlx"})
    # It writes through a private temporary file: give back the permissions of an ordinary one.
    path.chmod(path.parent.stat().st_mode & 0o666)
    advance(sum(leaf.nbytes - leaf.nbytes // 2 for leaf in shard))
    return list(specs)


def _check_target(target: Path, force: bool) -> None:
    """Refuse to overwrite anything, or with ``force`` anything but a checkpoint."""
    if not target.exists():
        return
    if not target.is_dir():
        refuse("init_model", "out must be a directory", target)
    content = list(target.iterdir())
    if not content:
        return
    if not force:
        refuse("init_model", "out must be empty or new (force replaces a checkpoint)", target)
    if any(item.is_dir() for item in content) or not (target / "config.json").is_file():
        rule = "force replaces only a checkpoint: a folder with a config.json and without folders"
        refuse("init_model", rule, target)


@contextmanager
def _appearing(target: Path, force: bool) -> Iterator[Path]:
    """A folder to write into that becomes ``target`` on success and vanishes on failure."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            _check_target(target, force)
            former = target.with_name(f".{target.name}.former-{os.getpid()}")
            target.rename(former)
            partial.rename(target)
            shutil.rmtree(former)
        else:
            partial.rename(target)
    except BaseException:  # an interrupt too must leave nothing behind
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _progress(num_bytes: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal; yields what to call with the bytes done."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("weights", total=num_bytes)
        yield lambda done: bar.advance(task, done)


def _write_json(path: Path, content: Config) -> None:
    path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")
