"""What the emulator raises."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Finding


class ToolchainError(RuntimeError):
    """There is no usable C++ compiler; the message says what to install."""


@dataclass(frozen=True)
class Diagnostic:
    """One reason why a source does not compile.

    Attributes:
        file: as the preprocessor names it; a kernel given as a string has the name it was compiled under.
        line, column: from 1; column 0 where it is unknown.
        message: what is wrong.
        text: the user's own line, without its newline; empty where the file cannot be read.
    """

    file: str
    line: int
    column: int
    message: str
    text: str = ""

    def __str__(self) -> str:
        at = f"{self.file}:{self.line}" + (f":{self.column}" if self.column else "")
        return f"{at}: {self.message}" + (f"\n    {self.text.strip()}" if self.text.strip() else "")


class CompileError(ValueError):
    """A source that Apple's compiler would refuse too, or that the emulator does not support.

    Attributes:
        diagnostics: every reason found, in source order.
    """

    def __init__(self, what: str, diagnostics: Sequence[Diagnostic]) -> None:
        self.diagnostics = tuple(diagnostics)
        super().__init__("\n".join([f"[emulator] {what} does not compile:", *map(str, diagnostics)]))


class EmulatorError(RuntimeError):
    """A kernel did what it must not: read outside a buffer, raced, ran too long.

    Attributes:
        findings: all that was found, each with its place in the source.
    """

    def __init__(self, kernel: str, findings: Sequence[Finding]) -> None:
        self.findings = tuple(findings)
        count = f"{len(findings)} finding" + ("s" if len(findings) != 1 else "")
        super().__init__("\n".join([f"[emulator] {kernel}: {count}", *map(str, findings)]))
