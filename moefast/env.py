"""Every environment variable moefast reads, in one place.

===================  ===================================================================================
``MOEFAST_BACKEND``  default backend: ``auto`` (fastest available), or a name of ``moefast.backends()``
``MOEFAST_LOG``      ``1``, true, yes or on: log which kernel each operation chose and why others refused
===================  ===================================================================================

They are read once, when moefast is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import refuse

_ON, _OFF = ("1", "true", "yes", "on"), ("0", "false", "no", "off", "")


@dataclass(frozen=True)
class Settings:
    """The environment, parsed."""

    backend: str = "auto"
    log: bool = False

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> Settings:
        """Parse ``environ``. Raises ValueError naming the variable."""
        log = environ.get("MOEFAST_LOG", "").lower()
        if log not in (*_ON, *_OFF):
            refuse("env", f"MOEFAST_LOG must be one of {(*_ON, *_OFF)}", repr(log))
        return cls(backend=environ.get("MOEFAST_BACKEND", "") or "auto", log=log in _ON)


settings = Settings.read(os.environ)
