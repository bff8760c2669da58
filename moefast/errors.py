"""The one way moefast refuses bad input: operation, rule and value in a single sentence."""

from __future__ import annotations

from typing import Any, NoReturn


def refuse(operation: str, rule: str, got: Any) -> NoReturn:
    """Raise ``ValueError("[operation] rule, got value.")``."""
    raise ValueError(f"[{operation}] {rule}, got {got}.")
