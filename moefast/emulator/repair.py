"""What Metal takes, C++ for OpenCL refuses, and only types tell: repaired where the compiler found it.

Two things: a scalar that is wider than the elements of the vector beside it (`half4 * float`), which becomes
one of them, and a list with too few values for a vector (`float4 v = {0}`), whose rest is zero. A source with
neither is compiled once.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from subprocess import CompletedProcess

Compile = Callable[[str, tuple[str, ...]], "CompletedProcess[str]"]

_RANK = "scalar operand type has greater rank than the type of the vector element"
_FEW = re.compile(r"too few elements in vector initialization \(expected (\d+) elements?, have (\d+)\)")
_ASK = ("-fsyntax-only", "-ferror-limit=0", "-fdiagnostics-print-source-range-info")
_RANGED = re.compile(r"^(.*?):(\d+):(\d+)(?::((?:\{\d+:\d+-\d+:\d+\})+))?: error: (.*)$", re.MULTILINE)
_RANGE = re.compile(r"\{(\d+):(\d+)-(\d+):(\d+)\}")
_MARKER = re.compile(r'#\s*(?:line\s+)?(\d+)\s+"((?:[^"\\]|\\.)*)"')
_ROUNDS = 8  # an operand of a repaired expression may need repair in turn


def compile_repaired(compile_: Compile, text: str) -> CompletedProcess[str]:
    """The compiler's result for ``text``, or for what it was repaired to.

    Args:
        compile_: takes a text and more flags.
    """
    done = compile_(text, ())
    for _ in range(_ROUNDS):
        if _RANK not in done.stderr and not _FEW.search(done.stderr):
            break
        repaired = _repair(text, compile_(text, _ASK).stderr)
        if repaired == text:
            break
        text = repaired
        done = compile_(text, ())
    return done


def _repair(text: str, errors: str) -> str:
    lines = _Lines(text)
    edits: dict[tuple[int, int], str] = {}
    for file, line, column, ranges, message in _RANGED.findall(errors):
        spans = [
            (lines.offset(int(first), int(left)), lines.offset(int(last), int(right)))
            for first, left, last, right in _RANGE.findall(ranges)
        ]
        if message.startswith(_RANK) and len(spans) == 2:
            scalar, vector = spans if not _is_vector(message.split("' and '")[0]) else spans[::-1]
            kind = " ".join(text[vector[0] : vector[1]].split())
            edits[scalar] = f"msl_scalar_for<decltype({kind})>({text[scalar[0] : scalar[1]]})"
        elif few := _FEW.match(message):
            closing = _closing(text, lines.of_file(file, int(line), int(column)))
            if closing:
                missing = int(few[1]) - int(few[2])
                edits[closing, closing] = ", 0" * missing
    out, at = [], 0
    for (start, end), by in sorted(edits.items(), key=lambda edit: edit[0]):
        if start < at:
            continue  # inside another: the next round
        out += [text[at:start], by]
        at = end
    return "".join([*out, text[at:]])


def _is_vector(of: str) -> bool:
    return "vector of" in of or "ext_vector_type" in of


def _closing(text: str, at: int) -> int:
    """The brace that closes the one at ``at``; 0 if there is none."""
    depth = 0
    for i in range(at, len(text) if text[at : at + 1] == "{" else at):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return i
    return 0


class _Lines:
    """Offsets of lines. The compiler counts ranges by lines of the text, places by lines of the files it was
    made of; columns are bytes, from 1."""

    def __init__(self, text: str) -> None:
        self.lines = text.split("\n")
        self.starts: list[int] = []
        self.files: dict[tuple[str, int], int] = {}  # the line of the text
        file, number, at = "", 1, 0
        for i, line in enumerate(self.lines):
            self.starts.append(at)
            at += len(line) + 1
            if line.startswith("#") and (marker := _MARKER.match(line)):
                number, file = int(marker[1]), marker[2].replace("\\\\", "\\")
            else:
                self.files.setdefault((file, number), i + 1)
                number += 1

    def offset(self, line: int, column: int) -> int:
        before = self.lines[line - 1].encode()[: column - 1]
        return self.starts[line - 1] + len(before.decode(errors="ignore"))

    def of_file(self, file: str, line: int, column: int) -> int:
        return self.offset(self.files.get((file, line), 1), column)
