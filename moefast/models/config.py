"""What every family's ``ModelArgs`` shares: reading a config.json of either transformers generation."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from ..errors import refuse
from ..specs import RouterSpec


@dataclass
class BaseArgs(ABC):
    """Base of the ``ModelArgs``; ``model_type`` names the family in errors."""

    # field -> other names that configurations give it
    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    # RouterSpec's word -> the family's, for errors
    ROUTER_WORDS: ClassVar[Mapping[str, str]] = {}

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Self:
        """Build from a config.json; keys that no field has are ignored, as in mlx-lm. A null is a choice
        where the field may be None, and elsewhere the same as no entry.

        Raises:
            ValueError: a required field is missing, or a setting is contradictory or unsupported.
        """
        family = str(params.get("model_type"))
        values = flatten_rope_parameters(params, family)
        for name, aliases in cls.ALIASES.items():
            for alias in aliases:
                if values.get(name) is None and values.get(alias) is not None:
                    values[name] = values[alias]
        known = fields(cls)
        takes_none = {f.name for f in known if "None" in str(f.type)}
        values = {name: value for name, value in values.items() if value is not None or name in takes_none}
        missing = [
            f.name
            for f in known
            if f.default is MISSING and f.default_factory is MISSING and f.name not in values
        ]
        if missing:
            refuse(family, f"config.json must set {missing}", f"only {sorted(values)}")
        names = {f.name for f in known}
        partial = values.get("partial_rotary_factor", 1.0)
        if "partial_rotary_factor" not in names and partial != 1.0:
            refuse(family, "partial_rotary_factor must be 1 in this family", partial)
        return cls(**{name: value for name, value in values.items() if name in names})

    def require(self, field: str, allowed: tuple[object, ...], why: str = "") -> None:
        """Refuse a setting that nothing here implements.

        Raises:
            ValueError: naming family, field, the allowed values and the one found.
        """
        value = getattr(self, field)
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            refuse(self._family, f"{field} must be {choices}{why}", repr(value))

    def check_counts(self, *names: str) -> None:
        """Refuse sizes and counts that are not whole numbers of at least 1.

        Raises:
            ValueError: naming family, field and value.
        """
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                refuse(self._family, f"{name} must be a whole number of at least 1", repr(value))

    def check_heads(self, heads: int, kv_heads: int) -> None:
        """Refuse key-value heads that the query heads cannot share out among themselves.

        Raises:
            ValueError: naming family and both numbers.
        """
        if kv_heads < 1 or heads % kv_heads:
            refuse(
                self._family, f"the number of key-value heads must divide the {heads} query heads", kv_heads
            )

    def check_routing(self) -> None:
        """Build the routing once, so that a configuration no router can run fails here.

        Raises:
            ValueError: naming family, setting and value.
        """
        try:
            self.router_spec()
        except ValueError as error:
            message = str(error).removeprefix("[RouterSpec] ")
            for word, field in self.ROUTER_WORDS.items():
                message = re.sub(rf"\b{word}\b", field, message)
            raise ValueError(f"[{self._family}] {message}") from None

    @abstractmethod
    def router_spec(self) -> RouterSpec:
        """The family's routing with this configuration's numbers."""

    @property
    def _family(self) -> str:
        return str(getattr(self, "model_type", type(self).__name__))


def flatten_rope_parameters(params: Mapping[str, Any], family: str) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5 as the three settings of transformers 4 it replaced:
    ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling``.

    Raises:
        ValueError: the configuration has both and they disagree, or positions differ from layer to layer.
    """
    values = dict(params)
    former_scaling = _canonical(values.get("rope_scaling") or {})
    scaling = dict(values.pop("rope_parameters", None) or {})
    if any(isinstance(value, Mapping) for value in scaling.values()):
        refuse(family, "rope_parameters must be the same for all layers", sorted(scaling))
    given = bool(scaling)
    for name in ("rope_theta", "partial_rotary_factor"):
        value, former = scaling.pop(name, None), values.get(name)
        if value is not None and former is not None and value != former:
            refuse(family, f"{name} must agree with rope_parameters, which gives {value!r}", repr(former))
        if value is not None:
            values[name] = value
    scaling = _canonical(scaling)
    if given and former_scaling and former_scaling != scaling:
        refuse(family, f"rope_scaling must agree with rope_parameters, which gives {scaling}", former_scaling)
    values["rope_scaling"] = scaling or former_scaling or None
    return values


def _canonical(scaling: Mapping[str, Any]) -> dict[str, Any]:
    """A rope scaling under one spelling of its type; empty for none. transformers 5 writes both spellings."""
    rest = {k: v for k, v in scaling.items() if k not in ("type", "rope_type") and v is not None}
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    return {} if kind == "default" else {"rope_type": kind, **rest}
