"""``moefast lm server``: real HTTP requests, and the answers are those of mlx-lm's own server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import pytest
from test_server import wait_for

from moefast.lm import init_model

ROOT = Path(__file__).resolve().parents[1]
PROMPTS = ["Once upon a time", "The tide", "A b c d e f g", "Four score and seven"]
TOKENS = 12


class Servers(NamedTuple):
    """Addresses, and what the accelerated one wrote."""

    accelerated: str
    plain: str
    log: Path


@contextmanager
def serving(checkpoint: Path, log: Path, *program: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", *program, "--model", str(checkpoint), "--port", str(port)]
    with (
        log.open("w") as written,
        subprocess.Popen(command, stdout=written, stderr=written, cwd=ROOT, env=os.environ) as server,
    ):
        try:
            yield f"http://127.0.0.1:{port}", server
        finally:
            server.kill()


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    folder = tmp_path_factory.mktemp("lm_server")
    checkpoint = init_model("qwen2_moe", folder / "m", dtype="float32").path
    logs = folder / "moefast.log", folder / "mlx_lm.log"
    with ExitStack() as running:  # both start before either is waited for
        ours = running.enter_context(serving(checkpoint, logs[0], "moefast", "lm", "server"))
        theirs = running.enter_context(serving(checkpoint, logs[1], "mlx_lm", "server"))
        addresses = [wait_for(*one, log) for one, log in zip((ours, theirs), logs, strict=True)]
        yield Servers(*addresses, logs[0])


def post(address: str, path: str, **body: Any) -> str:
    request = Request(
        f"{address}/v1/{path}",
        data=json.dumps({"max_tokens": TOKENS, "temperature": 0.0, **body}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urlopen(request, timeout=100) as answer:
        text: str = answer.read().decode()
    return text


def completion(address: str, prompt: str) -> str:
    text: str = json.loads(post(address, "completions", prompt=prompt))["choices"][0]["text"]
    return text


def message(prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": prompt}]


def chat(address: str, prompt: str) -> Any:
    return json.loads(post(address, "chat/completions", messages=message(prompt)))["choices"][0]["message"]


def streamed(text: str) -> list[Any]:
    """The choices of a stream's events."""
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [json.loads(event)["choices"][0] for event in events]


def test_the_model_is_accelerated(servers: Servers) -> None:
    completion(servers.accelerated, PROMPTS[0])
    assert "moefast: 2 MoE blocks" in servers.log.read_text()


def test_completions(servers: Servers) -> None:
    answers = [completion(servers.accelerated, prompt) for prompt in PROMPTS]
    assert answers == [completion(servers.plain, prompt) for prompt in PROMPTS]
    assert len(set(answers)) > 1
    assert all(answers)


def test_a_repeated_prompt_comes_from_the_prompt_cache(servers: Servers) -> None:
    expected = completion(servers.plain, PROMPTS[1])
    assert [completion(servers.accelerated, PROMPTS[1]) for _ in range(2)] == [expected] * 2


def test_chat(servers: Servers) -> None:
    for prompt in PROMPTS[:2]:
        got, want = chat(servers.accelerated, prompt), chat(servers.plain, prompt)
        assert got == want
        assert got["content"]


def test_concurrent_requests(servers: Servers) -> None:
    """They are batched: rows of several requests in each MoE layer."""
    with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:
        completions = pool.map(lambda prompt: completion(servers.accelerated, prompt), PROMPTS)
        chats = pool.map(lambda prompt: chat(servers.accelerated, prompt), PROMPTS)
        got = [*completions], [*chats]
    assert got[0] == [completion(servers.plain, prompt) for prompt in PROMPTS]
    assert got[1] == [chat(servers.plain, prompt) for prompt in PROMPTS]


def test_streaming(servers: Servers) -> None:
    body = {"prompt": PROMPTS[0], "stream": True}
    got, want = (streamed(post(a, "completions", **body)) for a in (servers.accelerated, servers.plain))
    assert [c["text"] for c in got] == [c["text"] for c in want]
    assert len(got) > 1


def test_streaming_chat(servers: Servers) -> None:
    body = {"messages": message(PROMPTS[0]), "stream": True}
    got, want = (streamed(post(a, "chat/completions", **body)) for a in (servers.accelerated, servers.plain))
    assert [c["delta"] for c in got] == [c["delta"] for c in want]
    assert len(got) > 1
