"""The hook: every model that mlx-lm loads comes back accelerated.

mlx-lm has no plug-ins. But all its ways to a model (``load``, ``sharded_load`` and with them its commands
and its server) look up ``mlx_lm.utils.load_model`` when they are called, so wrapping that one function
reaches them all. Adapters are loaded and models are sharded after it: accelerated layers look at what they
have become when they are called.

DBRX is loaded as :mod:`moefast.models.dbrx`, which has its experts stacked from the start: stacking those of
mlx-lm's class would need memory for a copy of a layer. Adapters of its single experts then have nowhere to
go, and what such a model saves has the stacks' names: ``install(dbrx=False)`` or ``MOEFAST=0`` for those.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from functools import partial, update_wrapper
from typing import Any

import mlx.nn

from ..backends import registry
from ..env import settings
from ..registry import log
from . import sampling
from .known import PACKAGE
from .model import accelerate

Load = Callable[..., tuple[mlx.nn.Module, dict[str, Any]]]
Classes = tuple[type, type]

_DBRX = f"{PACKAGE}.dbrx"
_OWN = "moefast.models."
_CLASSES = "get_model_classes"


def install(*, dbrx: bool = True) -> bool:
    """Wrap ``mlx_lm.utils.load_model``; needs mlx-lm. It is wrapped once, however often this is called.

    Args:
        dbrx: False leaves DBRX to mlx-lm, neither loaded otherwise nor stacked, so that its parameters keep
            their names: for what trains it. The last call counts.

    Returns:
        Whether models will be accelerated: ``MOEFAST=0`` switches everything off.

    Raises:
        ValueError: ``MOEFAST_BACKEND`` names no backend.
    """
    if not settings.enabled:
        return False
    registry.check(registry.default)  # here rather than in the middle of loading
    from mlx_lm import utils

    hook = _installed(utils.load_model)
    if hook is None:
        hook = Hook(utils.load_model)
        utils.load_model = hook
    hook.active, hook.dbrx = True, dbrx
    return True


def uninstall() -> bool:
    """Undo :func:`install`; whether there was something to undo. Models that are loaded stay as they are.

    Where someone has wrapped the function once more, theirs stays and the hook only passes calls on.
    """
    utils: Any = sys.modules.get("mlx_lm.utils")
    hook = None if utils is None else _installed(utils.load_model)
    if hook is None or not hook.active:
        return False
    hook.active = False
    if utils.load_model is hook:
        utils.load_model = hook.__wrapped__
    return True


def _installed(load_model: Any) -> Hook | None:
    """The hook, be it the function itself or what others have wrapped."""
    return next((f for f in _layers(load_model) if isinstance(f, Hook)), None)


def _layers(function: Any) -> Iterator[Any]:
    while function is not None:
        yield function
        function = getattr(function, "__wrapped__", None)


class Hook:
    """Takes the place of ``load_model``: the same arguments, results and errors.

    Attributes:
        active: False passes calls on.
        dbrx: whether DBRX is accelerated.
    """

    active: bool
    dbrx: bool
    __wrapped__: Load

    def __init__(self, original: Load):
        update_wrapper(self, original)
        self._said: tuple[object, str] | None = None

    def __call__(self, *arguments: Any, **named: Any) -> tuple[mlx.nn.Module, dict[str, Any]]:
        """See ``mlx_lm.utils.load_model``."""
        if not self.active:
            return self.__wrapped__(*arguments, **named)
        model, config, own = self._load(arguments, named)
        path = arguments[0] if arguments else named.get("model_path")
        if type(model).__module__.startswith(_OWN):
            sampling.attach(model)
        if own:
            self._say(path, f"moefast: DBRX as {type(model).__module__}, with its experts stacked")
        elif type(model).__module__ == _DBRX and not self.dbrx:
            self._say(path, "moefast: DBRX is left to mlx-lm here, whose names its experts keep")
        elif not type(model).__module__.startswith(_OWN):  # that has nothing left to accelerate
            report = str(accelerate(model))
            self._say(path, report if settings.log else report.partition("\n")[0])
        return model, config

    def _load(
        self, arguments: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[mlx.nn.Module, dict[str, Any], bool]:
        """Model, configuration, and whether its class is moefast's, chosen here."""
        parameters = inspect.signature(self.__wrapped__).parameters
        given = {*list(parameters)[: len(arguments)], *named}
        if not self.dbrx or _CLASSES not in parameters or _CLASSES in given:
            return *self.__wrapped__(*arguments, **named), False
        asked: list[type] = []
        classes = partial(_classes, parameters[_CLASSES].default, asked)
        try:
            return *self.__wrapped__(*arguments, **named, **{_CLASSES: classes}), bool(asked)
        except (ValueError, KeyError) as error:
            if not asked:
                raise
            log.info("%s cannot take this checkpoint, mlx-lm's class is asked: %s", asked[0], error)
        return *self.__wrapped__(*arguments, **named), False

    def _say(self, path: object, text: str) -> None:
        """To stderr; sharded_load loads a model twice."""
        if self._said != (path, text):
            print(text, file=sys.stderr)
        self._said = path, text


def _classes(original: Callable[..., Classes], asked: list[type], config: dict[str, Any]) -> Classes:
    """mlx-lm's classes for a configuration, or moefast's for DBRX: then ``asked`` has the model's."""
    found = original(config=config)
    if found[0].__module__ != _DBRX or config.get("quantize_activations"):
        return found
    from ..models import get_classes

    own = get_classes(config)
    try:
        own[1].from_dict(config)  # type: ignore[attr-defined]
    except ValueError as error:
        log.info("DBRX is loaded as mlx-lm's class: %s", error)
        return found
    asked.append(own[0])
    return own
