"""``moefast verify``: a model as mlx-lm runs it against the same model accelerated, in one process.

1. The plain model generates, greedily. On a CPU it runs in float32, whatever the checkpoint's dtype: MLX's
   CPU accumulates half precision in half precision, and is no yardstick there.
2. Each layer that :func:`moefast.accelerate` takes over is asked again on the input it had, before and after
   (:mod:`.compare_layers`), and the accelerated model is led along the plain model's tokens, so that every
   step can be compared.
3. Where that was in another dtype than the checkpoint's, layers and model are compared once more in the
   checkpoint's own, which is what a user runs.

What passes is said by :mod:`moefast.testing`, whose bounds are summed where both sides err:

- a layer's output: ``bound`` of its operation, on tokens with the same experts;
- routing: the same experts, but where the plain router's keys differ by less than its ``routing_bound`` and
  the error of its logits;
- logits, in the plain model's dtype: ``logits_bound``, the largest error of each step and the RMS error of
  all. A step behind a token whose routing is within that bound of another is not held to it: an expert may
  have changed there, and all that follows;
- greedy tokens: equal, but where the plain model's two best logits are within that bound.

In the checkpoint's own dtype only layers are judged; what a whole model may lose by it is a matter of the
model, and is stated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn
import numpy as np

from ..acceleration import Report, accelerate, accelerated, restore
from ..acceleration.hook import install, uninstall
from ..acceleration.look import activation_dtype
from ..backends import backends, registry
from ..env import settings
from ..errors import refuse
from ..registry import device_name
from ..testing import Bound, Error, error, float64, logits_bound
from ..weights import dtype_name
from .compare_layers import Figures, Layer, close_calls, compare, keep_input, run_plain
from .recording import recorded

PROMPT = "A mixture of experts sends each token to a few of its networks, and the router decides"

# Called with what is being done and its number of steps, then with an empty text and 1 for each step.
Say = Callable[[str, int], None]


class Step(NamedTuple):
    """The logits that follow one token.

    Attributes:
        error: of the accelerated model's.
        plain, accelerated: the most probable token.
        tied: the plain model's two best logits are within the bound.
        unsure: a token up to here may have been routed otherwise.
    """

    error: Error
    plain: int
    accelerated: int
    tied: bool
    unsure: bool


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """In one dtype.

    Attributes:
        dtype, plain_dtype: of the accelerated and of the plain model.
        layers: in the model's order.
        steps: one for each generated token.
        limit: on the logits; None where they are not judged.
        problem: what the accelerated model raised, or None.
        remark: why it was not run to the end, where that is no fault of it.
    """

    dtype: str
    plain_dtype: str
    layers: tuple[Figures, ...]
    steps: tuple[Step, ...]
    limit: Bound | None
    problem: str | None = None
    remark: str | None = None

    def wrong_steps(self) -> list[int]:
        """Numbers of the steps that fail, each by itself."""
        if self.limit is None:
            return []
        return [
            i
            for i, step in enumerate(self.steps)
            if (not step.error.max <= self.limit.max or (step.plain != step.accelerated and not step.tied))
            and not step.unsure
        ]

    @property
    def rms(self) -> float:
        """Of the logits, over all steps that are judged, or over all where none is."""
        steps = [s for s in self.steps if self.limit is not None and not s.unsure] or list(self.steps)
        return float(np.sqrt(np.mean([step.error.rms**2 for step in steps]))) if steps else 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing fails."""
        layers = all(layer.passed is not False for layer in self.layers)
        judged = self.limit is not None and not all(step.unsure for step in self.steps)
        rms = not judged or (self.limit is not None and self.rms <= self.limit.rms)
        return layers and self.problem is None and not self.wrong_steps() and rms


@dataclass(frozen=True, kw_only=True)
class Result:
    """Everything.

    Attributes:
        model: directory or repository.
        report: of the acceleration.
        prompt_tokens: length of the prompt.
        comparisons: in the plain model's dtype; then in the checkpoint's, if that is another.
    """

    model: str
    report: Report
    prompt_tokens: int
    comparisons: tuple[Comparison, ...]

    @property
    def passed(self) -> bool:
        """Whether all comparisons pass."""
        return all(comparison.passed for comparison in self.comparisons)


def verify(
    model: str, *, tokens: int = 64, prompt: str | None = None, backend: str = "auto", say: Say | None = None
) -> Result:
    """Compare a checkpoint's model with the same model accelerated.

    Args:
        model: a directory, or the id of a Hugging Face repository, of any family of mlx-lm.
        tokens: that are generated and compared.
        prompt: text before them.
        backend: see :func:`moefast.accelerate`.
        say: is told of the progress.

    Raises:
        ValueError: an argument breaks a rule, ``MOEFAST=0``, or the plain model cannot run here.
        FileNotFoundError: there is no such checkpoint.
    """
    registry.check(backend)
    reason = None if backend == "auto" else backends()[backend]
    if reason is not None:
        refuse("verify", f"backend {backend!r} must be able to run here", reason)
    if tokens < 1:
        refuse("verify", "tokens must be at least 1", tokens)
    if prompt == "":
        refuse("verify", "prompt must not be empty", repr(prompt))
    if not settings.enabled:
        refuse("verify", "MOEFAST must not switch moefast off", "MOEFAST=0")
    from .load import _load_tokenizer, folder_of

    folder = folder_of(model)
    say = say or (lambda text, steps: None)
    say("load", 1)
    loaded, config = _load(folder)
    ids = list(_load_tokenizer(folder, config.get("eos_token_id")).encode(prompt or PROMPT))
    own = activation_dtype(loaded)
    dtype = mx.float32 if device_name() == "cpu" else own
    if dtype != own:
        loaded.set_dtype(dtype)
    say("", 1)
    with accelerated(loaded, backend=backend) as report:
        pass  # what there is to be compared
    layers = _layers(loaded, report)
    try:
        plain, chosen = _plain_run(loaded, layers, ids, tokens, own, say)
    except Exception as raised:  # whatever MLX raises: without it there is nothing to compare with
        rule = "the plain model must be able to run here"
        raise ValueError(f"[verify] {rule}, got {type(raised).__name__}: {raised}") from raised
    path = ids + chosen[:-1]
    report = accelerate(loaded, backend=backend)
    comparisons = [_compare(loaded, layers, path, plain, dtype, dtype, say)]
    if dtype != own:
        restore(loaded)
        del loaded
        for layer in layers:
            layer.module = None
        loaded, _ = _load(folder)
        report = accelerate(loaded, backend=backend)
        layers = _again(loaded, layers, report)
        comparisons.append(_compare(loaded, layers, path, plain, own, dtype, say))
    return Result(model=model, report=report, prompt_tokens=len(ids), comparisons=tuple(comparisons))


def _load(folder: Path) -> tuple[mlx.nn.Module, dict[str, Any]]:
    """mlx-lm's model, whatever has been installed."""
    from mlx_lm import utils

    hooked = uninstall()
    try:
        model, config = utils.load_model(folder)
    finally:
        if hooked:
            install()
    return model, config


def _layers(model: mlx.nn.Module, report: Report) -> list[Layer]:
    modules = dict(model.named_modules())
    return [Layer(entry, modules[entry.path]) for entry in report.accelerated]


def _again(model: mlx.nn.Module, layers: list[Layer], report: Report) -> list[Layer]:
    """The same layers in a model that was loaded anew; what is accelerated may depend on its dtype."""
    known = {layer.entry.path: layer for layer in layers}
    modules = dict(model.named_modules())
    found = []
    for entry in report.accelerated:
        layer = known.get(entry.path) or Layer(entry, None, problem="it is accelerated in this dtype only")
        layer.entry, layer.module = entry, modules[entry.path]
        found.append(layer)
    return found


def _plain_run(
    model: Any, layers: list[Layer], prompt: list[int], tokens: int, rounded: mx.Dtype, say: Say
) -> tuple[list[Any], list[int]]:
    """Logits of each step, ``[vocabulary]`` float64, and the tokens chosen; layers get input and answer."""
    say("plain model", tokens)
    logits: list[Any] = []
    with recorded([layer.module for layer in layers]) as calls:
        for step in _lead(model, prompt, lambda: int(np.argmax(logits[-1])), tokens):
            logits.append(step)
            # What was recorded would keep the whole computation alive.
            mx.eval([call.arguments for own in calls for call in own[-1:]])
            say("", 1)
    say("its layers", len(layers))
    for layer, own in zip(layers, calls, strict=True):
        keep_input(layer, own, rounded)
        own.clear()
        run_plain(layer)
        say("", 1)
    return logits, [int(np.argmax(step)) for step in logits]


def _lead(model: Any, prompt: list[int], following: Callable[[], int], tokens: int) -> Any:
    """Logits after the prompt, then after each further token that ``following`` gives."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    given = prompt
    for i in range(tokens):
        yield float64(model(mx.array([given]), cache=cache)[0, -1])
        if i + 1 < tokens:
            given = [following()]


def _compare(
    model: mlx.nn.Module,
    layers: list[Layer],
    path: list[int],
    plain: list[Any],
    dtype: mx.Dtype,
    plain_dtype: mx.Dtype,
    say: Say,
) -> Comparison:
    name = dtype_name(dtype)
    say(f"accelerated layers, {name}", len(layers))
    figures = []
    for layer in layers:
        figures.append(compare(layer, dtype, plain_dtype))
        say("", 1)
    say(f"accelerated model, {name}", len(plain))
    prompt = path[: len(path) - len(plain) + 1]
    rest = iter(path[len(prompt) :])
    logits: list[Any] = []
    problem = None
    try:
        for step in _lead(model, prompt, lambda: next(rest), len(plain)):
            logits.append(step)
            say("", 1)
    except Exception as raised:  # whatever a broken kernel raises is a finding
        problem = f"step {len(logits)}: {type(raised).__name__}: {' '.join(str(raised).split())}"
    remark = None
    if problem is not None and dtype != plain_dtype and not _runs(model, prompt):
        problem, remark = None, f"the plain model does not run in {name} here, either: {problem}"
    limit = logits_bound(plain_dtype, layers=_depth(model), hidden=_hidden(model), length=len(path))
    unsure = len(path)
    for layer in layers:
        close = np.flatnonzero(close_calls(layer, plain_dtype, limit.max))
        unsure = min(unsure, int(close[0]) if len(close) else unsure)
    steps = [
        _step(got, want, limit, unsure <= len(prompt) - 1 + i)
        for i, (got, want) in enumerate(zip(logits, plain, strict=False))
    ]
    return Comparison(
        dtype=name,
        plain_dtype=dtype_name(plain_dtype),
        layers=tuple(figures),
        steps=tuple(steps),
        limit=limit if dtype == plain_dtype else None,
        problem=problem,
        remark=remark,
    )


def _runs(model: mlx.nn.Module, prompt: list[int]) -> bool:
    """Whether the plain model does, to which this one is restored."""
    restore(model)
    try:
        next(_lead(model, prompt, lambda: 0, 1))
    except Exception:  # whatever MLX raises
        return False
    return True


def _step(got: Any, want: Any, limit: Bound, unsure: bool) -> Step:
    best, plain = int(np.argmax(got)), int(np.argmax(want))
    tied = bool(want[plain] - want[best] <= 2 * limit.max * np.abs(want).max())
    return Step(error(got, want), plain, best, tied, unsure)


def _depth(model: mlx.nn.Module) -> int:
    """In layers as the bound counts them: attention in a latent space is two projections and a norm in the
    place of one."""
    is_latent = any(hasattr(module, "kv_lora_rank") for _, module in model.named_modules())
    return max(len(getattr(model, "layers", [])), 1) * (2 if is_latent else 1)


def _hidden(model: mlx.nn.Module) -> int:
    """Width of the residual stream: of the embedding's rows."""
    for _, module in model.named_modules():
        if isinstance(module, mlx.nn.QuantizedEmbedding):
            return int(module.scales.shape[-1] * module.group_size)
        if isinstance(module, mlx.nn.Embedding):
            return int(module.weight.shape[-1])
    return 1
