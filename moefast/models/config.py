"""What every family's ``ModelArgs`` shares: reading a config.json of either transformers generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar, Self

from ..errors import refuse


@dataclass
class BaseArgs:
    """Base of the ``ModelArgs``; ``model_type`` names the family in errors."""

    # field -> other names that configurations give it
    ALIASES: ClassVar[Mapping[str, tuple[str, ...]]] = {}

    @classmethod
    def from_dict(cls, params: Mapping[str, Any]) -> Self:
        """Build from a config.json; keys that no field has are ignored, as in mlx-lm.

        Raises:
            ValueError: a required field is missing, or a setting is contradictory or unsupported.
        """
        family = str(params.get("model_type"))
        values = flatten_rope_parameters(params)
        for name, aliases in cls.ALIASES.items():
            for alias in aliases:
                if values.get(name) is None and values.get(alias) is not None:
                    values[name] = values[alias]
        known = {f.name for f in fields(cls)}
        missing = [
            f.name
            for f in fields(cls)
            if f.default is MISSING and f.default_factory is MISSING and f.name not in values
        ]
        if missing:
            refuse(family, f"config.json must set {missing}", f"only {sorted(values)}")
        return cls(**{name: value for name, value in values.items() if name in known})

    def require(self, field: str, allowed: tuple[object, ...], why: str = "") -> None:
        """Refuse a setting that nothing here implements.

        Raises:
            ValueError: naming family, field, the allowed values and the one found.
        """
        value = getattr(self, field)
        if value not in allowed:
            choices = " or ".join(repr(a) for a in allowed)
            refuse(str(getattr(self, "model_type", "")), f"{field} must be {choices}{why}", repr(value))


def flatten_rope_parameters(params: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_parameters`` of transformers 5 as the three settings of transformers 4 it replaced:
    ``rope_theta``, ``partial_rotary_factor`` and ``rope_scaling``.

    Raises:
        ValueError: the configuration has both, and they disagree.
    """
    values = dict(params)
    rope = values.pop("rope_parameters", None)
    if not rope:
        return values
    rope = dict(rope)
    unpacked: dict[str, Any] = {}
    for name in ("rope_theta", "partial_rotary_factor"):
        if name in rope:
            unpacked[name] = rope.pop(name)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    unpacked["rope_scaling"] = None if rope_type == "default" else rope
    for name, value in unpacked.items():
        former = values.get(name)
        if former is not None and value is not None and former != value:
            refuse("config", f"rope_parameters gives {name}={value!r}; {name} must agree", repr(former))
        if value is not None or name not in values:
            values[name] = value
    return values
