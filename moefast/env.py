"""Every environment variable moefast reads, in one place.

===================  ===================================================================================
``MOEFAST_BACKEND``  default backend: ``auto`` (fastest available), or a name of ``moefast.backends()``
``MOEFAST_LOG``      ``1``: log to stderr which kernel each operation chose and why others refused
===================  ===================================================================================

They are read once, when moefast is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import refuse


@dataclass(frozen=True)
class Settings:
    """The environment, parsed."""

    backend: str = "auto"
    log: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Parse ``environ``. Raises ValueError naming the variable."""
        log = environ.get("MOEFAST_LOG", "0")
        if log not in ("0", "1", ""):
            refuse("env", "MOEFAST_LOG must be 0 or 1", repr(log))
        return cls(backend=environ.get("MOEFAST_BACKEND", "") or "auto", log=log == "1")


settings = Settings.read(os.environ)
