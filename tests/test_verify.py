"""What can be told of a checkpoint from its files alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("safetensors")

from moefast.lm.verify import INDEX, Stored, read_json, read_tensors

Spoil = Callable[[Path], object]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of two files: a head, and three quantized experts."""
    experts = {
        f"{EXPERTS}.{e}.{name}": value
        for e in range(3)
        for name, value in (
            ("up.weight", mx.zeros((4, 8), mx.uint32)),
            ("up.scales", mx.zeros((4, 1), mx.bfloat16)),
            ("up.biases", mx.zeros((4, 1), mx.bfloat16)),
        )
    }
    mx.save_safetensors(str(tmp_path / FIRST), {"head.weight": mx.zeros((3, 5))})
    mx.save_safetensors(str(tmp_path / SECOND), experts)
    weight_map = {"head.weight": FIRST, **dict.fromkeys(experts, SECOND)}
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tmp_path


def test_tensors_of_all_files(folder: Path) -> None:
    tensors = read_tensors(folder)
    assert len(tensors) == 10
    assert tensors["head.weight"] == Stored(FIRST, (3, 5), "F32")
    assert tensors[f"{EXPERTS}.2.up.scales"] == Stored(SECOND, (4, 1), "BF16")


def test_an_index_is_not_needed(folder: Path) -> None:
    indexed = read_tensors(folder)
    (folder / INDEX).unlink()
    assert read_tensors(folder) == indexed


def test_only_what_mlx_lm_reads_counts(folder: Path) -> None:
    """Originals often come with a second copy of everything in one file of another name."""
    shutil.copy(folder / FIRST, folder / "consolidated.safetensors")
    assert len(read_tensors(folder)) == 10


def case(name: str, spoil: Spoil, message: str, error: type[Exception] = ValueError) -> Any:
    """A row of the table: how to break the checkpoint, and what is said of it."""
    return pytest.param(spoil, error, message, id=name)


def remove(*names: str) -> Spoil:
    return lambda folder: [(folder / name).unlink() for name in names]


def write(name: str, content: bytes) -> Spoil:
    return lambda folder: (folder / name).write_bytes(content)


def cut(size: int) -> Spoil:
    return lambda folder: os.truncate(folder / SECOND, size)


def indexed(name: str, file: Any) -> Spoil:
    def apply(folder: Path) -> None:
        content = json.loads((folder / INDEX).read_text())
        content["weight_map"][name] = file
        (folder / INDEX).write_text(json.dumps(content))

    return apply


def header(**changes: Any) -> Spoil:
    """Falsify the entry of the second expert's weight."""

    def apply(folder: Path) -> None:
        raw = (folder / SECOND).read_bytes()
        length = int.from_bytes(raw[:8], "little")
        entries = json.loads(raw[8 : 8 + length])
        entries[f"{EXPERTS}.1.up.weight"].update(changes)
        text = json.dumps(entries).encode()
        (folder / SECOND).write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return apply


def tensors(change: Callable[[dict[str, mx.array]], Any]) -> Spoil:
    """Rewrite the second file, and drop the index that no longer fits."""

    def apply(folder: Path) -> None:
        weights = mx.load(str(folder / SECOND))
        change(weights)
        mx.eval(weights)
        mx.save_safetensors(str(folder / SECOND), weights)
        (folder / INDEX).unlink()

    return apply


WHOLE = f"{re.escape(SECOND)} must be a whole safetensors file, got"
WEIGHT = re.escape(f"'{EXPERTS}.1.up.weight'")


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        case(
            "no weights",
            remove(INDEX, FIRST, SECOND),
            r"must hold model\*\.safe.*got none",
            FileNotFoundError,
        ),
        case("a file is missing", remove(FIRST), f"its index names, got no {FIRST}", FileNotFoundError),
        case("one nobody reads", indexed("a", "a.safetensors"), "got no a.safetensors", FileNotFoundError),
        case("index: bad JSON", write(INDEX, b"{"), f"{INDEX} must be valid JSON"),
        case("index: no map", write(INDEX, b'{"weight_map": []}'), "weight_map of .* must be a JSON object"),
        case(
            "index: no tensor", indexed("a", SECOND), f"tensor 'a' must be in {SECOND}, .*got no such tensor"
        ),
        case("index: elsewhere", indexed("head.weight", SECOND), f"'head.weight' must .*got it in {FIRST}"),
        case(
            "a tensor twice",  # left over from a conversion into another number of files
            lambda folder: shutil.copy(folder / FIRST, folder / "model.safetensors"),
            f"tensor 'head.weight' must be in one file of .*, got {FIRST} and model.safetensors",
        ),
        case("truncated", cut(1000), f"{WHOLE} 1000 bytes, where the header promises [0-9]+"),
        case("truncated header", cut(99), f"{WHOLE} 99 bytes, which end within the header"),
        case("empty", cut(0), f"{WHOLE} 0 bytes, which end within the header"),
        case("too long", lambda f: (f / SECOND).open("ab").write(b"tail"), f"{WHOLE} .* header promises"),
        case("no header", write(SECOND, b"\x02" + b"\0" * 7 + b"[]"), WHOLE),
        case("offsets overlap", header(data_offsets=[0, 128]), f"{WHOLE} tensor .*, where [0-9]+ is next"),
        case("offsets are no numbers", header(data_offsets=["a", "b"]), WHOLE),
        case(
            "shape",
            header(shape=[4, 7]),
            rf"{WHOLE} tensor {WEIGHT} of 128 bytes, where U32 \[4, 7\] takes 112",
        ),
        case(
            "other dtype", header(dtype="F8_E4M3"), f"{WHOLE} tensor {WEIGHT} of 128 bytes, where .* takes 32"
        ),
        case("no dtype", header(dtype="Q4"), f"{WHOLE} .*Q4"),
        case(
            "no scales",
            tensors(lambda w: w.pop(f"{EXPERTS}.1.up.scales")),
            f"tensor '{EXPERTS}.1.up.scales' must be there: '.*1.up..*' in {SECOND} is quantized, got none",
        ),
        case(
            "part of an expert",
            tensors(lambda w: w.pop(f"{EXPERTS}.1.up.biases")),
            f"tensor '{EXPERTS}.1.up.biases' must be there: .* got none; the others are in {SECOND}",
        ),
        case(
            "unlike experts",
            tensors(lambda w: w.update({f"{EXPERTS}.2.up.scales": mx.zeros((4, 2), mx.bfloat16)})),
            rf"'{EXPERTS}.2.up.scales' in {SECOND} must be like other experts' \(\(4, 1\), 'BF16'\), got",
        ),
    ],
)
def test_refused(spoil: Spoil, error: type[Exception], message: str, folder: Path) -> None:
    spoil(folder)
    with pytest.raises(error, match=message) as raised:
        read_tensors(folder)
    assert str(raised.value).startswith("[load] ")


@pytest.mark.parametrize("text", ["", "{", "\x00", "{'a': 1}"])
def test_bad_json(text: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"\[load\] {re.escape(str(path))} must be valid JSON, got "):
        read_json(path)


def test_json_in_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_bytes('{"a": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="must be valid JSON"):
        read_json(path)
