"""Tensor and pipeline parallelism: two ranks of a ring on this machine compute what one process computes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from distributed.worker import CHECKS, block, wide
from mlx_lm.tuner.utils import linear_to_lora_layers
from model_builders import ours, parameters
from model_cases import BASE, FULL, Case, Config

RANKS = 2
WORKER = Path(__file__).parent / "distributed" / "worker.py"
# A run takes a fraction of it; what is left over when it ends is a rank waiting for another.
SECONDS = 90

# A rank's failures by check, and what the ranks printed.
Outcome = tuple[list[dict[str, str | None]], str]


def free_ports(count: int) -> list[int]:
    """Ports that were free a moment ago."""
    sockets = [socket.socket() for _ in range(count)]
    for s in sockets:
        s.bind(("127.0.0.1", 0))
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def run_ranks(folder: Path, worker: Path) -> Outcome:
    """Run the worker on every rank."""
    hosts = folder / "hosts.json"
    hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in free_ports(RANKS)]))
    results = [folder / f"rank{rank}.jsonl" for rank in range(RANKS)]
    logs = [folder / f"rank{rank}.log" for rank in range(RANKS)]
    processes = []
    try:
        for rank in range(RANKS):
            with logs[rank].open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, str(worker), str(results[rank])],
                        env={
                            **os.environ,
                            "MLX_RANK": str(rank),
                            "MLX_HOSTFILE": str(hosts),
                            "PYTHONPATH": os.pathsep.join([str(worker.parent.parent), *sys.path]),
                        },
                        stdin=subprocess.DEVNULL,
                        stdout=log,
                        stderr=subprocess.STDOUT,
                    )
                )
        deadline = time.monotonic() + SECONDS
        while any(p.poll() is None for p in processes) and time.monotonic() < deadline:
            if any(p.returncode for p in processes):
                break  # one has died; the others would wait for it for ever
            time.sleep(0.05)
    finally:
        for p in processes:
            p.kill()
            p.wait()
    lines = [path.read_text().splitlines() if path.exists() else [] for path in results]
    found = [{r["check"]: r["failure"] for r in map(json.loads, rank_lines)} for rank_lines in lines]
    return found, "\n".join(log.read_text() for log in logs)


def run_twice(tmp_path_factory: pytest.TempPathFactory, worker: Path) -> Outcome:
    """:func:`run_ranks`, and once more if another process was given one of the ports in between."""
    found, log = run_ranks(tmp_path_factory.mktemp("ranks"), worker)
    if not any(found):
        found, log = run_ranks(tmp_path_factory.mktemp("ranks_again"), worker)
    return found, log


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    if not mx.distributed.is_available("ring"):
        pytest.skip("this build of MLX has no ring backend")
    return run_twice(tmp_path_factory, WORKER)


@pytest.mark.distributed
@pytest.mark.parametrize("check", CHECKS)
def test_ranks_agree_with_one_process(check: str, outcome: Outcome) -> None:
    found, log = outcome
    for rank, failures in enumerate(found):
        assert check in failures, f"rank {rank} never came to this check:\n{log}"
        assert failures[check] is None, f"rank {rank}: {failures[check]}"


class Ranks:
    """A group that is only asked how large it is."""

    def __init__(self, size: int):
        self._size = size

    def size(self) -> int:
        return self._size


def assert_refused(model: Any, ranks: int, words: tuple[str, ...]) -> None:
    """Sharding is refused in these words, and leaves the model as it was."""
    before = {path: value.shape for path, value in parameters(model).items()}
    with pytest.raises(ValueError, match=r"^\[shard\] .*\.$") as refused:
        model.shard(Ranks(ranks))
    for word in words:
        assert word in str(refused.value)
    assert {path: value.shape for path, value in parameters(model).items()} == before


@pytest.mark.parametrize("case", FULL, ids=str)
def test_heads_must_divide(case: Case) -> None:
    assert_refused(ours(case.config, {}), 4, ("2 key-value heads", "4"))
    assert_refused(ours(case.config, {}), 3, ("4 query heads", "3"))


@pytest.mark.parametrize("case", FULL, ids=str)
def test_quantization_groups_must_divide(case: Case) -> None:
    # 64 wide: one quantization group, which two ranks cannot share.
    output = {"bailing_moe": "dense", "dbrx": "out_proj"}.get(case.family, "o_proj")
    if case.family == "glm4_moe":  # heads of 32 give the attention two groups, the experts have one
        output = "down_proj"
    assert_refused(ours(case.config, bits=4), 2, (output, "64", "2 ranks", "32 per rank"))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"moe_intermediate_size": 65}, ("down_proj", "65", "2")),  # the experts
        ({"shared_expert_intermediate_size": 129}, ("down_proj", "129", "2")),  # the shared expert
        ({"mlp_only_layers": [1], "intermediate_size": 63}, ("down_proj", "63", "2")),  # a later, dense layer
    ],
)
def test_widths_must_divide(settings: Config, words: tuple[str, ...]) -> None:
    assert_refused(ours({**BASE["qwen2_moe"], **settings}, {}), 2, words)


def test_adapted_layers_are_not_sharded() -> None:
    model = ours(wide(BASE["qwen2_moe"]), {})
    linear_to_lora_layers(
        model, 1, {"rank": 4, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.switch_mlp.up_proj"]}
    )
    assert_refused(model, 2, ("up_proj", "LoRASwitchLinear"))


def test_identity_experts_are_not_sharded() -> None:
    moe, _ = block()
    moe.spec = type(moe.spec)(num_experts=4, top_k=2, identity_experts=1)
    assert_refused(moe, 2, ("identity_experts", "1"))
