"""``moefast.huge_pages``: memory moves, and nothing that can be seen of it changes."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import mlx.nn
import numpy as np
import pytest

import moefast
from moefast import pages
from moefast.backends.native.loading import bindings

MEGABYTE = 1 << 20
PAGE_SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
# The first that has the request.
LINUX = (6, 1)


def bytes_in_huge_pages(array: mx.array) -> int:
    """What the system says of the mappings that the array lies in."""
    address = np.asarray(array).ctypes.data
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if span := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            low, high = (int(bound, 16) for bound in span.groups())
            inside = low < address + array.nbytes and address < high
        elif inside and line.startswith("AnonHugePages:"):
            found += int(line.split()[1]) * 1024
    return found


def why_not() -> str | None:
    """Why nothing can be moved here."""
    if bindings().native is None:
        return bindings().reason
    release = tuple(
        int(part) for part in re.findall(r"\d+", Path("/proc/sys/kernel/osrelease").read_text())[:2]
    )
    if release < LINUX or not PAGE_SIZE.exists():
        return "the system cannot move memory into huge pages"
    if int(PAGE_SIZE.read_text()) > 2 * MEGABYTE:
        return "the system's huge pages are larger than what is moved here"
    return None


def test_weights_move_and_stay_what_they_are() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    model = mlx.nn.Linear(1024, 4096, bias=False)  # 16 MB
    mx.eval(model.parameters())
    values = np.array(model.weight)
    address = np.asarray(model.weight).ctypes.data
    # The system may have to make room first, and says so by refusing.
    moved = max(moefast.huge_pages(model) for _ in range(3))
    assert 14 * MEGABYTE <= moved <= 16 * MEGABYTE
    assert bytes_in_huge_pages(model.weight) >= moved
    assert np.asarray(model.weight).ctypes.data == address
    assert np.array_equal(values, np.asarray(model.weight))
    assert moefast.huge_pages([model.weight]) == moved  # again: they are there already
    assert mx.array_equal(model(mx.ones(1024)), mx.ones(1024) @ mx.array(values).T)


def test_small_weights_share_pages() -> None:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    arrays = [mx.full(MEGABYTE // 4, float(i)) for i in range(64)]
    mx.eval(arrays)
    moved = max(moefast.huge_pages(arrays) for _ in range(3))
    assert moved > 32 * MEGABYTE  # but for those at the ends of mappings
    for i, array in enumerate(arrays):
        assert mx.array_equal(array, mx.full(MEGABYTE // 4, float(i)))


def test_nothing_moves_where_the_environment_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    array = mx.zeros((4096, 1024))
    mx.eval(array)
    monkeypatch.setattr(pages, "settings", replace(pages.settings, huge_pages=False))
    assert moefast.huge_pages([array]) == 0


def test_nothing_is_evaluated() -> None:
    lazy = mx.ones((1024, 1024)) + 1
    before = mx.get_active_memory()
    assert moefast.huge_pages([lazy]) == 0
    assert mx.get_active_memory() - before < MEGABYTE
    assert lazy.sum().item() == 2 * 1024 * 1024


@pytest.mark.parametrize("array", [mx.zeros(0), mx.ones(5), mx.broadcast_to(mx.ones(1), (4096, 4096))])
def test_what_fills_no_page_stays(array: mx.array) -> None:
    mx.eval(array)
    assert moefast.huge_pages([array]) == 0


def test_refuses_other_things() -> None:
    with pytest.raises(ValueError, match=r"\[huge_pages\] weights must be .* got ndarray"):
        moefast.huge_pages([np.ones(3)])  # type: ignore[list-item]
