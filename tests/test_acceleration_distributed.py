"""Tensor parallelism: two ranks of a ring on this machine compute, accelerated, what one process computes."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest
from distributed.accelerated import CHECKS
from marks import needs_native
from test_models_distributed import Outcome, run_twice

WORKER = Path(__file__).parent / "distributed" / "accelerated.py"


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    if not mx.distributed.is_available("ring"):
        pytest.skip("this build of MLX has no ring backend")
    return run_twice(tmp_path_factory, WORKER)


@needs_native
@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_accelerated_ranks_agree_with_one_process(check: str, outcome: Outcome) -> None:
    found, log = outcome
    for rank, failures in enumerate(found):
        assert check in failures, f"rank {rank} never came to this check:\n{log}"
        assert failures[check] is None, f"rank {rank}: {failures[check]}"
