"""A file of ``kernels/`` as one text, for compilers without an include path.

MLX's just-in-time compiler sees a string. Whatever a file includes from its own folder is put in place, once;
``#include <...>`` is the compiler's own affair. The file's entry points, which are there for whoever builds a
library of it, stand between ``#ifndef MOEFAST_JIT`` and ``#endif``.
"""

from __future__ import annotations

import re
from functools import cache

from ...paths import kernels_dir

_INCLUDE = re.compile(r'^#include "([^"]+)"[ \t]*\n', re.MULTILINE)


@cache
def header_of(file: str) -> str:
    """Everything in ``kernels/<file>`` but its entry points: the header of ``mx.fast.metal_kernel``.

    Raises:
        FileNotFoundError: no such file, or one that it includes.
    """
    return "#define MOEFAST_JIT\n" + _inlined(file, set())


def _inlined(file: str, seen: set[str]) -> str:
    seen.add(file)
    text = (kernels_dir() / file).read_text(encoding="utf-8")
    return _INCLUDE.sub(lambda m: "" if m[1] in seen else _inlined(m[1], seen), text)
