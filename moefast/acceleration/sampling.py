"""mlx-lm's log-probabilities, by :func:`moefast.ops.logsumexp`.

mlx-lm normalises the logits of every token that it generates: ``logits - mx.logsumexp(logits)``. It has no
place for another function there, and MLX's takes 3 to 4 ms on a CPU for a vocabulary of 150 000, between two
tokens, where nothing else can run. So as long as a model lives that moefast loaded or accelerated, the module
``mlx_lm.generate`` has under the name ``mx`` all of ``mlx.core`` but that function. Where the native backend
is not the one to take a call, it is MLX's; so is everything outside of that module.
"""

from __future__ import annotations

import sys
import threading
import weakref
from functools import partial
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn

from ..backends import registry
from ..backends.native import bindings
from ..env import settings
from ..ops.logsumexp import choose
from ..registry import device_name, log
from ..weights import FLOATS

_MODULE = "mlx_lm.generate"

_lock = threading.RLock()  # a model may be collected while it is held
_models: dict[int, weakref.ref[mlx.nn.Module]] = {}


class Core(ModuleType):
    """What ``mlx_lm.generate`` calls ``mx`` meanwhile."""

    def __getattr__(self, name: str) -> Any:
        return getattr(mx, name)

    def __dir__(self) -> list[str]:
        return dir(mx)

    @staticmethod
    def logsumexp(
        a: mx.array,
        /,
        axis: int | list[int] | tuple[int, ...] | None = None,
        keepdims: bool = False,
        *,
        stream: Any = None,
    ) -> mx.array:
        """See ``mlx.core.logsumexp``."""
        if keepdims and stream is None and _takes(a, axis):
            y: mx.array = choose(a, "native").run(a)
            return y
        return mx.logsumexp(a, axis, keepdims, stream=stream)


def attach(model: mlx.nn.Module) -> bool:
    """Have mlx-lm's generation use the native ``logsumexp`` until the model is gone or detached.

    Returns:
        Whether it will: not where the native backend cannot run, or runs through NumPy, nor on a GPU, nor
        where ``mlx_lm.generate`` has something else than ``mlx.core`` under the name ``mx``.
    """
    module = sys.modules.get(_MODULE)
    if module is None or not settings.enabled or not bindings().native or device_name() != "cpu":
        return False
    with _lock:
        found = vars(module).get("mx")
        if not isinstance(found, Core):
            if found is not mx:
                log.info("%s.mx is %r: its logsumexp is left alone", _MODULE, found)
                return False
            vars(module)["mx"] = Core(mx.__name__, mx.__doc__)
        key = id(model)
        _models[key] = weakref.ref(model, partial(_gone, key))
    return True


def detach(model: mlx.nn.Module) -> None:
    """Undo :func:`attach`: with the last model, ``mlx_lm.generate`` is as it was."""
    with _lock:
        reference = _models.get(id(model))
        if reference is not None and reference() is model:
            _gone(id(model), reference)


def _gone(key: int, reference: weakref.ref[mlx.nn.Module]) -> None:
    with _lock:
        if _models.get(key) is reference:  # and not another model's that has its address by now
            del _models[key]
        module = sys.modules.get(_MODULE)
        if not _models and module is not None and isinstance(vars(module).get("mx"), Core):
            vars(module)["mx"] = mx


def _takes(a: Any, axis: Any) -> bool:
    """Whether the kernel computes this: floats, their last axis or all that have more than one value."""
    if not isinstance(a, mx.array) or a.dtype not in FLOATS or a.size == 0:
        return False
    last = a.ndim > 0 and (axis in (-1, a.ndim - 1) or (axis is None and a.size == a.shape[-1]))
    return last and device_name() == "cpu" and registry.default in ("auto", "native")
