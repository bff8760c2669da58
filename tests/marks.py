"""Marks that several test files need."""

from __future__ import annotations

import pytest

import moefast

_WHY_NOT = moefast.backends()["native"]
# Skips with the reason why the native backend cannot run here.
needs_native = pytest.mark.skipif(_WHY_NOT is not None, reason=f"native: {_WHY_NOT}")
