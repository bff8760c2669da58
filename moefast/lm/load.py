"""Load a checkpoint into moefast's model of its family, or say exactly what is wrong with it."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import mlx.core as mx
import mlx.nn
from mlx.utils import tree_flatten

from ..acceleration import sampling
from ..backends import backends, registry, use_backend
from ..errors import refuse
from ..pages import huge_pages
from .verify import Tensors, read_json, read_tensors

if TYPE_CHECKING:
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Problems spelled out per kind; a wrong configuration has thousands, and three say as much.
_SHOWN = 3

# The methods of a model that are wrapped while mlx-lm's loader calls them.
_CHECKS = ("sanitize", "load_weights")

# Any one of them will do, according to the kind of tokenizer.
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*")

_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def load(
    path_or_repo: str | os.PathLike[str], *, backend: str = "auto", lazy: bool = False
) -> tuple[mlx.nn.Module, TokenizerWrapper]:
    """Load a model of one of moefast's families, and its tokenizer.

    Reads what mlx-lm reads: original Hugging Face checkpoints and mlx-lm's own, quantized or not (with
    other bits per layer where config.json says so), experts stacked or one by one, in one file or many.
    The loading itself is mlx-lm's; before it, the headers of all files are checked, and before a weight is
    assigned, all tensors are checked against the model. Weights end in huge pages of memory where the native
    backend is (:func:`moefast.huge_pages`), but for lazy ones; it also gives mlx-lm's generation its
    log-probabilities (:mod:`moefast.acceleration.sampling`).

    Args:
        path_or_repo: a directory, or the id (``owner/name``) of a Hugging Face repository, which mlx-lm
            downloads.
        backend: what ``backend="auto"`` stands for from now on in this process; see
            :func:`moefast.use_backend`. ``"auto"`` leaves the default as it is.
        lazy: leave the weights on disk until they are used.

    Returns:
        The model, in evaluation mode, with mlx-lm's ``Model`` interface, and mlx-lm's tokenizer.

    Raises:
        FileNotFoundError: the directory, or one of its files, is not there.
        ValueError: no such backend, or it cannot run here; a family that moefast does not have; a
            configuration, file or tensor that breaks a rule, each named. Nothing has changed then.
    """
    registry.check(backend)
    reason = None if backend == "auto" else backends()[backend]
    if reason is not None:
        refuse("load", f"backend {backend!r} must be able to run here", reason)
    folder = folder_of(path_or_repo)
    read_json(folder / "config.json")  # for its errors

    from mlx_lm.utils import load_config, load_model

    from ..models import get_classes

    config: dict[str, Any] = load_config(folder)
    get_classes(config)
    tensors = read_tensors(folder)
    tokenizer = _load_tokenizer(folder, config.get("eos_token_id"))
    model, _ = load_model(folder, lazy=lazy, get_model_classes=partial(_checked_classes, folder, tensors))
    for check in _CHECKS:
        delattr(model, check)  # the class's own methods are back
    huge_pages(model)
    sampling.attach(model)
    if backend != "auto":
        use_backend(backend)
    return model, tokenizer


def folder_of(path_or_repo: str | os.PathLike[str]) -> Path:
    """The checkpoint's directory; a repository is downloaded as mlx-lm does it."""
    local = Path(path_or_repo).expanduser()
    if local.is_dir():
        return local
    if local.exists():
        refuse("load", "path must be a directory with a config.json", local)
    if not isinstance(path_or_repo, str) or not _REPOSITORY.fullmatch(path_or_repo):
        raise FileNotFoundError(
            f"[load] path must be a directory, or a repository id owner/name, got {str(path_or_repo)!r}."
        )
    from mlx_lm.utils import _download

    return Path(_download(path_or_repo))


def _load_tokenizer(folder: Path, eos: int | list[int] | None) -> TokenizerWrapper:
    # Without any, transformers makes an empty one up.
    if not any(any(folder.glob(pattern)) for pattern in _VOCABULARIES):
        raise FileNotFoundError(f"[load] {folder} must hold a tokenizer ({_VOCABULARIES}), got none.")

    from mlx_lm.utils import load_tokenizer

    try:
        tokenizer: TokenizerWrapper = load_tokenizer(folder, eos_token_ids=eos)
    except Exception as error:  # transformers and tokenizers raise anything, bare Exceptions included
        raise ValueError(f"[load] the tokenizer in {folder} must be readable, got {error!r}.") from error
    return tokenizer


def _checked_classes(folder: Path, tensors: Tensors, config: dict[str, Any]) -> tuple[Any, type]:
    """The family's classes for mlx-lm's loader. The model built here checks what it is given before it
    takes any of it: it is then quantized as the configuration says, and the weights are renamed and stacked,
    so all there is to know is known, and nothing has been evaluated."""
    from ..models import get_classes

    model_class, args_class = get_classes(config)

    def build(args: Any) -> mlx.nn.Module:
        model: mlx.nn.Module = model_class(args)

        names = set(dict(tree_flatten(model.parameters())))

        def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
            try:
                return model_class.sanitize(model, weights)  # type: ignore[attr-defined,no-any-return]
            except (KeyError, IndexError, ValueError) as error:
                _refuse_source(folder, tensors, names, model, error)

        def load_weights(weights: list[tuple[str, mx.array]], strict: bool = True) -> mlx.nn.Module:
            _check(folder, tensors, model, dict(weights))
            return model_class.load_weights(model, weights, strict)  # type: ignore[attr-defined,no-any-return]

        # On the instance: mlx-lm's loader calls them by these names.
        for name, check in zip(_CHECKS, (sanitize, load_weights), strict=True):
            object.__setattr__(model, name, check)
        return model

    return build, args_class


def _refuse_source(
    folder: Path, tensors: Tensors, names: set[str], model: mlx.nn.Module, error: Exception
) -> NoReturn:
    """Refuse tensors that could not be arranged as the model has them: those that go by other names."""

    def describe(name: str) -> str:
        return f"{name!r} of shape {list(tensors[name].shape)} in {tensors[name].file}"

    other = {n for n in tensors.keys() - names if not n.endswith((".scales", ".biases"))}
    problem = f"{error!r} while arranging {'; '.join(_some(other, describe)) or 'them'}"
    refuse("load", f"{folder} must hold the tensors of its {_family(model)} configuration", problem)


def _check(folder: Path, tensors: Tensors, model: mlx.nn.Module, weights: dict[str, mx.array]) -> None:
    """Refuse weights that are not the model's parameters, one and all."""
    wanted: dict[str, mx.array] = dict(tree_flatten(model.parameters()))

    # What the model does not have under its own name: the source of what sanitize made, or a misspelling.
    others = [name for name in tensors if name not in wanted]

    def place(name: str) -> str:
        return f" in {tensors[name].file}" if name in tensors else nearest(name)

    def nearest(name: str) -> str:
        closest = _nearest(name, others)
        if closest is not None:
            return f" (nearest: {closest!r} in {tensors[closest].file})"
        beside = next((other for other in tensors if _layer(other) == _layer(name)), None)
        return "" if beside is None else f" (the rest of its layer is in {tensors[beside].file})"

    def misfit(name: str) -> str:
        return f"{name!r}{place(name)} as {_form(weights[name])} instead of {_form(wanted[name])}"

    both = wanted.keys() & weights.keys()
    problems = [
        *_some(wanted.keys() - weights.keys(), lambda name: f"no {name!r}{nearest(name)}"),
        *_some(weights.keys() - wanted.keys(), lambda name: f"unknown {name!r}{place(name)}"),
        *_some({name for name in both if not _fits(weights[name], wanted[name])}, misfit),
    ]
    if problems:
        rule = f"{folder} must hold the tensors of its {_family(model)} configuration"
        refuse("load", rule, "; ".join(problems))


def _family(model: mlx.nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))


def _fits(value: mx.array, wanted: mx.array) -> bool:
    """Any float dtype will do for a float parameter; packed words and fp8 scales must be what they are."""
    if value.shape != wanted.shape:
        return False
    if mx.issubdtype(wanted.dtype, mx.floating):
        return mx.issubdtype(value.dtype, mx.floating)
    return value.dtype == wanted.dtype


def _form(value: mx.array) -> str:
    return f"{str(value.dtype).removeprefix('mlx.core.')} {list(value.shape)}"


def _nearest(name: str, others: Iterable[str]) -> str | None:
    """The most similar of the names in the same layer, if any is similar."""
    candidates = [other for other in others if _layer(other) == _layer(name)]
    return next(iter(difflib.get_close_matches(name, candidates, n=1)), None)


def _layer(name: str) -> str | None:
    """What a tensor's name says before and in its first number: ``model.layers.3``."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found[0] if found else None


def _some(names: set[str], describe: Callable[[str], str]) -> list[str]:
    """Descriptions of the first few names, and how many more there are."""
    described = [describe(name) for name in sorted(names)[:_SHOWN]]
    more = len(names) - len(described)
    return [*described, f"and {more} more like it"] if more else described
