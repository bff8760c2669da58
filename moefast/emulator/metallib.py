"""Apple-compiled kernels: a ``.metallib`` holds each kernel as AIR, which is LLVM bitcode.

Layout of the file, as far as it is read here: a header with the places of its sections; a list of functions,
    each a
row of tagged fields (name, size, offset of its bitcode); the bitcode.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

_MAGIC = b"MTLB"
_SECTIONS = struct.Struct("<8Q")  # offset and size of: functions, public and private metadata, bitcode
_SECTIONS_AT = 24


class Metallib:
    """The kernels of a ``.metallib`` file.

    Raises:
        ValueError: it is not one; the message names the file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        with self.path.open("rb") as file:
            try:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except ValueError:
                raise ValueError(f"[metallib] {path} must be a Metal library, got an empty file.") from None
        if self._data[: len(_MAGIC)] != _MAGIC or len(self._data) < _SECTIONS_AT + _SECTIONS.size:
            raise ValueError(
                f"[metallib] {path} must be a Metal library, got one that starts {self._data[:4]!r}."
            )
        try:
            self._functions = dict(self._read_functions())
        except (struct.error, KeyError, UnicodeDecodeError) as error:
            raise ValueError(f"[metallib] {path} must be a whole Metal library: {error!r}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._functions)

    def __len__(self) -> int:
        return len(self._functions)

    def __contains__(self, name: object) -> bool:
        return name in self._functions

    def _read_functions(self) -> Iterator[tuple[str, tuple[int, int]]]:
        data = self._data
        functions, _, _, _, _, _, bitcode, _ = _SECTIONS.unpack_from(data, _SECTIONS_AT)
        (count,) = struct.unpack_from("<I", data, functions)
        at = functions + 4
        for _ in range(count):
            (size,) = struct.unpack_from("<I", data, at)
            fields = dict(self._fields(at + 4, at + size))
            name = fields[b"NAME"].rstrip(b"\0").decode()
            (length,) = struct.unpack("<Q", fields[b"MDSZ"])
            _, _, offset = struct.unpack("<3Q", fields[b"OFFT"])
            yield name, (bitcode + offset, length)
            at += size

    def _fields(self, at: int, end: int) -> Iterator[tuple[bytes, bytes]]:
        while at < end and (tag := bytes(self._data[at : at + 4])) != b"ENDT":
            (length,) = struct.unpack_from("<H", self._data, at + 4)
            yield tag, bytes(self._data[at + 6 : at + 6 + length])
            at += 6 + length

    def bitcode(self, name: str) -> bytes:
        """The AIR of one kernel.

        Raises:
            KeyError: there is no such kernel; the message names the nearest ones.
        """
        if name not in self._functions:
            import difflib

            near = ", ".join(difflib.get_close_matches(name, self._functions, 3, 0.4)) or "none like it"
            raise KeyError(f"[metallib] {self.path.name} has no kernel {name!r}; it has {near}")
        start, length = self._functions[name]
        return bytes(self._data[start : start + length])
