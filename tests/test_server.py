"""mlx-lm's HTTP server, real requests, with moefast's model in it: the text is mlx-lm's own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import mlx_lm
import pytest

from moefast.lm import init_model

PROMPTS = ["Once upon a time", "The tide", "A b c d e f g"]
TOKENS = 12

# The server loads through a name of its own module; this is all it takes to hand it another model.
SERVER = """
import sys, mlx_lm.server, moefast
from mlx_lm.utils import load_config
from pathlib import Path

def load(path, **_):
    model, tokenizer = moefast.load(path)
    assert type(model).__module__.startswith("moefast.")
    return model, tokenizer, load_config(Path(path))

mlx_lm.server.load = load
mlx_lm.server.main()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return init_model("glm4_moe", tmp_path_factory.mktemp("server") / "m", dtype="float32").path


@pytest.fixture(scope="module")
def address(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running server's address on the loopback interface."""
    log = tmp_path_factory.mktemp("log") / "server.log"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SERVER, "--model", str(checkpoint), "--port", str(port)]
    with log.open("w") as written, subprocess.Popen(command, stdout=written, stderr=written) as server:
        try:
            yield wait_for(f"http://127.0.0.1:{port}", server, log)
        finally:
            server.kill()


def wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> str:
    for _ in range(600):
        if server.poll() is not None:
            pytest.fail(f"the server ended:\n{log.read_text()}")
        try:
            urlopen(f"{address}/health", timeout=5).close()
            return address
        except (URLError, ConnectionError):
            time.sleep(0.1)
    pytest.fail("the server did not answer within a minute")


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, str]:
    """What stock mlx-lm says to each prompt."""
    model, tokenizer = mlx_lm.load(str(checkpoint))
    return {p: mlx_lm.generate(model, tokenizer, prompt=p, max_tokens=TOKENS) for p in PROMPTS}


def post(address: str, **body: Any) -> str:
    request = Request(
        f"{address}/v1/completions",
        data=json.dumps({"max_tokens": TOKENS, "temperature": 0.0, **body}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def completion(address: str, prompt: str) -> str:
    text: str = json.loads(post(address, prompt=prompt))["choices"][0]["text"]
    return text


def test_completions(address: str, expected: dict[str, str]) -> None:
    for prompt in PROMPTS:
        assert completion(address, prompt) == expected[prompt]


def test_a_repeated_prompt_comes_from_the_prompt_cache(address: str, expected: dict[str, str]) -> None:
    assert [completion(address, PROMPTS[0]) for _ in range(2)] == [expected[PROMPTS[0]]] * 2


def test_concurrent_requests_are_batched(address: str, expected: dict[str, str]) -> None:
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        answers = list(pool.map(lambda prompt: completion(address, prompt), PROMPTS))
    assert answers == [expected[prompt] for prompt in PROMPTS]


def test_streaming(address: str, expected: dict[str, str]) -> None:
    lines = post(address, prompt=PROMPTS[0], stream=True).splitlines()
    chunks = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    assert "".join(json.loads(c)["choices"][0]["text"] for c in chunks) == expected[PROMPTS[0]]
