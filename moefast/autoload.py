"""``import moefast.autoload``: from then on, every model that mlx-lm loads in this process is accelerated.

For scripts that call mlx-lm themselves; ``moefast lm`` does the same for its commands. The line may stand
before or after the import of mlx-lm, and does not import it. ``MOEFAST=0`` switches it off.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from .acceleration.hook import install

_TARGET = "mlx_lm.utils"


class _Finder(MetaPathFinder):
    """Installs the hook as soon as the module that it wraps a function of has been imported."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Of that one module: what the other finders say, with another loader."""
        if name != _TARGET:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(Loader):
    """Another one, and then the hook."""

    def __init__(self, original: Loader):
        self.original = original

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the original does."""
        return self.original.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """As the original does; afterwards the hook is installed."""
        spec = module.__spec__
        assert spec is not None
        spec.loader = module.__loader__ = self.original
        self.original.exec_module(module)
        install()


if _TARGET in sys.modules:
    install()
elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
    sys.meta_path.insert(0, _Finder())
