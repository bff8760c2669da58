"""How a backend is chosen: order, fallback, refusals, caching, defaults, environment, compilation."""

from __future__ import annotations

import contextvars
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

import moefast
from moefast import Projection, quantized_matmul, use_backend
from moefast.backends import registry as the_registry
from moefast.env import Settings
from moefast.registry import Backend, Declined, Kernel, Problem, Registry, phase_of

ROOT = Path(__file__).resolve().parents[1]


def problem(op: str = "route", phase: str = "decode") -> Problem:
    return Problem(op, "cpu", mx.float32, phase, ())


class Fake:
    """A backend that counts how often it is asked, and runs by returning its name."""

    def __init__(self, name: str, unavailable: str | None = None, refusal: str | None = None):
        self.probed = self.asked = 0
        self._unavailable, self._refusal = unavailable, refusal
        self.backend = Backend(name, {"route": Kernel(lambda: name, self._why_not)}, self._probe)

    def _probe(self) -> str | None:
        self.probed += 1
        return self._unavailable

    def _why_not(self, problem: Problem) -> str | None:
        self.asked += 1
        return self._refusal


def make(*fakes: Fake) -> Registry:
    registry = Registry(tuple(fake.backend for fake in fakes))
    registry.set_default("auto")  # whatever MOEFAST_BACKEND this test runs under
    return registry


# -- choosing ----------------------------------------------------------------------------------------------


def test_auto_takes_the_first_that_can() -> None:
    choice = make(Fake("fast"), Fake("slow")).choose(problem())
    assert (choice.backend, choice.run(), choice.refused) == ("fast", "fast", {})


def test_auto_falls_back_and_remembers_why() -> None:
    registry = make(Fake("gone", unavailable="no device"), Fake("picky", refusal="top_k=9 > 8"), Fake("slow"))
    choice = registry.choose(problem())
    assert choice.run() == "slow"
    assert choice.refused == {"gone": "no device", "picky": "top_k=9 > 8"}
    assert registry.choices() == [(problem(), choice)]


def choosy() -> Backend:
    """Takes every problem, but even numbers only."""

    def run(number: int) -> str:
        if number % 2:
            raise Declined(f"{number} is odd")
        return "choosy"

    return Backend("choosy", {"route": Kernel(run, may_decline=True)})


def test_a_kernel_that_declines_a_call_leaves_it_to_the_next() -> None:
    anything = Backend("anything", {"route": Kernel(lambda number: "anything")})
    registry = Registry((choosy(), Fake("picky", refusal="no").backend, anything))
    registry.set_default("auto")
    run = registry.choose(problem()).run
    assert [run(number) for number in (2, 3, 4)] == ["choosy", "anything", "choosy"]


def test_a_named_backend_that_declines_a_call_raises_its_reason() -> None:
    registry = Registry((choosy(), Fake("anything").backend))
    run = registry.choose(problem(), "choosy").run
    assert run(2) == "choosy"
    with pytest.raises(ValueError, match=r"\[route\] backend 'choosy' must be able to run .*3 is odd"):
        run(3)


def test_a_named_backend_runs_though_a_faster_one_could() -> None:
    fast, slow = Fake("fast"), Fake("slow")
    assert make(fast, slow).choose(problem(), "slow").run() == "slow"
    assert fast.asked == fast.probed == 0


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        (Fake("picky", refusal="top_k=9 > 8"), "top_k=9 > 8"),
        (Fake("picky", unavailable="no device"), "no device"),
    ],
)
def test_a_named_backend_that_cannot_raises_its_reason(fake: Fake, reason: str) -> None:
    slow = Fake("slow")
    with pytest.raises(ValueError, match=rf"\[route\] backend 'picky' must be able to run .*{reason}"):
        make(fake, slow).choose(problem(), "picky")
    assert slow.asked == 0


def test_a_missing_kernel_is_a_reason() -> None:
    with pytest.raises(ValueError, match=r"\[moe\] backend 'fast' .*no moe kernel"):
        make(Fake("fast")).choose(problem("moe"), "fast")


def test_auto_never_chooses_what_is_opt_in() -> None:
    def declining(*_: Any) -> Any:
        raise Declined("no")

    first = Backend("first", {"route": Kernel(declining, may_decline=True)})
    eager = Backend("eager", {"route": Kernel(lambda: "eager")}, opt_in=True)
    registry = Registry((eager, first, Fake("last").backend))
    registry.set_default("auto")
    choice = registry.choose(problem())
    assert (choice.backend, choice.refused) == ("first", {})
    assert choice.run() == "last"  # instead of what declined
    assert registry.choose(problem(), "eager").run() == "eager"


def test_auto_raises_all_reasons_when_nothing_can() -> None:
    registry = make(Fake("a", refusal="too many experts"), Fake("b", unavailable="no device"))
    with pytest.raises(ValueError, match=r"\[route\] .*too many experts.*no device"):
        registry.choose(problem())
    assert registry.choices() == []


@pytest.mark.parametrize("former", ["auto", "reference"])
def test_the_default_can_be_set_and_restored(former: str) -> None:
    registry = make(Fake("fast"), Fake("reference"))
    registry.set_default(former)
    assert registry.set_default("fast") == former
    assert registry.default == "fast"
    assert registry.set_default(former) == "fast"
    assert registry.default == former


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    message = r"\[backend\] backend must be one of \('auto', 'fast', 'slow'\), got 'cuda'\."
    with pytest.raises(ValueError, match=message):
        make(Fake("fast"), Fake("slow")).choose(problem(), "cuda")
    former = the_registry.default
    with pytest.raises(ValueError, match=r"\[backend\] backend must be one of .*got 'cuda'"):
        use_backend("cuda")
    assert the_registry.default == former


def test_a_problem_is_decided_once_for_each_name() -> None:
    picky, slow = Fake("picky", refusal="never"), Fake("slow")
    registry = make(picky, slow)
    for _ in range(3):
        registry.choose(problem())
    assert (picky.asked, slow.asked) == (1, 1)
    for _ in range(3):
        registry.choose(problem(), "slow")
    registry.choose(problem(phase="prefill"))
    assert (picky.asked, slow.asked) == (2, 3)


def test_a_backend_is_probed_once_and_only_when_needed() -> None:
    gone, slow = Fake("gone", unavailable="no device"), Fake("slow")
    registry = make(gone, slow)
    assert gone.probed == 0
    for phase in ("empty", "decode", "band", "prefill"):
        registry.choose(problem(phase=phase))
    assert (gone.probed, gone.asked, slow.probed) == (1, 0, 1)


@pytest.mark.parametrize(
    ("shape", "phase"),
    [
        ((0, 64), "empty"),
        ((2, 0, 64), "empty"),
        ((64,), "decode"),  # a vector is one token
        ((1, 1, 64), "decode"),
        ((2, 64), "band"),
        ((127, 64), "band"),
        ((2, 64, 64), "prefill"),
        ((128, 64), "prefill"),
    ],
)
def test_phases(shape: tuple[int, ...], phase: str) -> None:
    assert phase_of(shape) == phase


# -- the default -------------------------------------------------------------------------------------------


@pytest.fixture
def second(monkeypatch: pytest.MonkeyPatch) -> Callable[[mx.array], bool]:
    """moefast with a second backend, ``sevens``, whose products are all 7; says whether an array is one's."""

    def run(x: mx.array, weight: Projection) -> mx.array:
        return mx.full((*x.shape[:-1], weight.layout.out_dims), 7.0)

    sevens = Backend("sevens", {"quantized_matmul": Kernel(run)})
    values = {
        "backends": (*the_registry.backends, sevens),
        "_choices": {},
        "_defaults": [],
        "_of_environment": "auto",
    }
    for name, value in values.items():
        monkeypatch.setitem(vars(the_registry), name, value)
    return lambda y: bool(mx.all(y == 7.0).item())


X, WEIGHT = mx.ones((2, 4)), Projection(mx.ones((3, 4)))


def ran() -> str:
    """The backend that ``auto`` stands for here, by running something."""
    return "sevens" if quantized_matmul(X, WEIGHT)[0, 0].item() == 7 else "reference"


def elsewhere(function: Callable[[], Any]) -> Any:
    """What ``function`` returns on another thread."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_operations_take_a_backend(second: Callable[[mx.array], bool]) -> None:
    assert not second(quantized_matmul(X, WEIGHT))
    assert second(quantized_matmul(X, WEIGHT, backend="sevens"))
    assert not second(quantized_matmul(X, WEIGHT, backend="reference"))


@pytest.mark.usefixtures("second")
def test_as_a_statement_it_is_the_process() -> None:
    use_backend("sevens")
    assert (ran(), elsewhere(ran)) == ("sevens", "sevens")
    use_backend("auto")
    assert (ran(), elsewhere(ran)) == ("reference", "reference")


@pytest.mark.usefixtures("second")
def test_as_a_block_it_is_this_context_only() -> None:
    with use_backend("sevens"):
        assert (ran(), elsewhere(ran)) == ("sevens", "reference")
        assert contextvars.copy_context().run(ran) == "sevens"
        assert contextvars.Context().run(ran) == "reference"
    assert (ran(), elsewhere(ran)) == ("reference", "reference")


@pytest.mark.usefixtures("second")
def test_blocks_nest_and_end_with_exceptions() -> None:
    def fail_inside(name: str) -> None:
        with use_backend(name):
            raise RuntimeError(ran())

    use_backend("sevens")
    with use_backend("auto"):
        assert ran() == "reference"
        with pytest.raises(RuntimeError, match="sevens"):
            fail_inside("sevens")
        assert ran() == "reference"
        assert elsewhere(ran) == "sevens"
    assert ran() == "sevens"


@pytest.mark.usefixtures("second")
def test_one_object_can_be_entered_twice() -> None:
    block = use_backend("sevens")
    for _ in range(2):
        with block, block:
            assert ran() == "sevens"
        assert ran() == "reference"


@pytest.mark.usefixtures("second")
def test_threads_that_enter_blocks_at_once_leave_no_default() -> None:
    """Both objects exist before either block begins, as when two threads race."""
    one, other = use_backend("sevens"), use_backend("reference")
    with one, other:
        assert ran() == "reference"
    assert the_registry.default == "auto"
    one, other = use_backend("sevens"), use_backend("reference")
    with other, one:
        assert ran() == "sevens"
    assert the_registry.default == "auto"


@pytest.mark.usefixtures("second")
def test_statements_do_not_pile_up() -> None:
    """A server that sets the default with each request must not remember them all."""
    for _ in range(100):
        use_backend("reference")
    assert len(the_registry._defaults) <= 2


@pytest.mark.usefixtures("second")
def test_an_argument_beats_the_block() -> None:
    with use_backend("sevens"):
        assert quantized_matmul(X, WEIGHT, backend="reference")[0, 0].item() == 4


def test_compile_freezes_the_choice(second: Callable[[mx.array], bool]) -> None:
    """A compiled function keeps the backend it was traced with; another shape traces, and chooses, again."""
    compiled = mx.compile(lambda x: quantized_matmul(x, WEIGHT))
    with use_backend("sevens"):
        assert second(compiled(X))
    assert second(compiled(X))
    assert not second(compiled(mx.ones((5, 4))))
    with use_backend("sevens"):
        assert not second(compiled(mx.ones((5, 4))))


def test_backends_lists_what_can_run() -> None:
    assert moefast.backends()["reference"] is None
    assert list(moefast.backends())[-1] == "reference", "the reference runs anything: nothing can follow it"


# -- the environment ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, Settings()),
        ({"MOEFAST_BACKEND": "", "MOEFAST_LOG": ""}, Settings()),  # set but empty is unset
        ({"MOEFAST_BACKEND": "reference"}, Settings(backend="reference")),
        ({"MOEFAST_LOG": "1"}, Settings(log=True)),
        ({"MOEFAST_METAL": "emulate"}, Settings(metal="emulate")),
        ({"MOEFAST_LOG": "Yes"}, Settings(log=True)),
        ({"MOEFAST_HUGE_PAGES": "off"}, Settings(huge_pages=False)),
        ({"MOEFAST_LOG": "0", "OTHER": "x"}, Settings()),
    ],
)
def test_settings(environment: dict[str, str], expected: Settings) -> None:
    assert Settings.read(environment) == expected


def test_settings_refuse_by_name() -> None:
    with pytest.raises(ValueError, match=r"\[env\] MOEFAST_LOG must be one of .*, got 'loud'\."):
        Settings.read({"MOEFAST_LOG": "loud"})
    with pytest.raises(ValueError, match=r"\[env\] MOEFAST_METAL must be .*, got 'gpu'\."):
        Settings.read({"MOEFAST_METAL": "gpu"})
    with pytest.raises(ValueError, match=r"\[env\] MOEFAST_HUGE_PAGES must be one of .*, got 'some'\."):
        Settings.read({"MOEFAST_HUGE_PAGES": "some"})


PROGRAM = """
import mlx.core as mx
from moefast import Projection, quantized_matmul, use_backend
{before}
print(quantized_matmul(mx.ones((1, 4)), Projection(mx.ones((3, 4)))).tolist())
"""


def run_with(before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", PROGRAM.format(before=before)],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_environment_names_the_default_and_log_tells_it() -> None:
    done = run_with(MOEFAST_BACKEND="reference", MOEFAST_LOG="1")
    assert done.stdout == "[[4.0, 4.0, 4.0]]\n", done.stderr
    assert "quantized_matmul" in done.stderr
    assert "reference" in done.stderr


def test_a_wrong_name_in_the_environment_is_traced_to_its_variable() -> None:
    done = run_with(MOEFAST_BACKEND="metalic")
    assert done.returncode != 0
    allowed = the_registry.names()
    assert f"[env] MOEFAST_BACKEND must be one of {allowed}, got 'metalic'." in done.stderr
    # It is only a default: what is said in the program is not disturbed by it.
    assert run_with('use_backend("reference")', MOEFAST_BACKEND="metalic").returncode == 0


def test_nothing_is_logged_unasked() -> None:
    done = run_with(MOEFAST_LOG="0", MOEFAST_BACKEND="")
    assert (done.returncode, done.stderr) == (0, "")
