"""The same model in moefast and in llama.cpp, each in a process of its own: threads that one keeps waiting
are not in the other's way, and both can be measured by turns."""

from __future__ import annotations

import ctypes
import multiprocessing
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Logits = npt.NDArray[np.float32]


class Moefast:
    """moefast's model in bfloat16, random weights all in 4 bits, generating through mlx-lm.

    Args:
        config: the content of a config.json.
        seed: of the weights.
    """

    def __init__(self, config: Mapping[str, Any], seed: int):
        from moefast.acceleration import sampling
        from moefast.lm.bench.bandwidth import reader
        from moefast.lm.bench.models import build, bytes_per_token, draw_weights

        self._config = config
        self._model = build(config, bits=4, everywhere=True)
        draw_weights(self._model, seed)
        sampling.attach(self._model)  # as moefast.load does
        self._bytes = bytes_per_token(self._model)
        self._read = reader()

    def save(self, path: Path, form: str) -> None:
        """Write it for llama.cpp."""
        from gguf_file import save

        save(path, self._model, self._config, form)

    def allowed(self) -> float:
        """Tokens a second that the memory allows now: reading the weights of a token, and nothing else."""
        assert self._read is not None, "moefast's native backend is not there"
        return self._read() * 1e9 / self._bytes

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Of the last of some tokens, ``[vocabulary]``."""
        import mlx.core as mx

        return np.asarray(self._model(mx.array([tokens]))[0, -1].astype(mx.float32))

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds until the first token after a prompt."""
        start = time.perf_counter()
        steps = self._generate(tokens, 1)
        next(steps)
        seconds = time.perf_counter() - start
        for _ in steps:  # the step that mlx-lm has begun meanwhile
            pass
        return seconds

    def decode(self, context: Sequence[int], count: int) -> float:
        """Seconds for ``count`` tokens after a context and the first."""
        steps = self._generate(context, count + 1)
        next(steps)
        start = time.perf_counter()
        for _ in steps:
            pass
        return time.perf_counter() - start

    def _generate(self, tokens: Sequence[int], count: int) -> Iterator[Any]:
        import mlx.core as mx
        from mlx_lm.generate import generate_step

        steps: Iterator[Any] = generate_step(mx.array(tokens), self._model, max_tokens=count)
        return steps


class LlamaCpp:
    """The same in llama.cpp, from a file.

    Args:
        path: of a GGUF file.
        threads: to compute with.
        length: most tokens of a prompt and what follows it.
    """

    def __init__(self, path: Path, threads: int, length: int):
        import llama_cpp

        self._lib = llama_cpp
        self._silence = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._silence, ctypes.c_void_p(0))
        model = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not model:
            raise ValueError(f"[peers] llama.cpp must be able to load the model, got {path}.")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = length
        options.n_threads = options.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, options)
        if not self._context:
            raise ValueError(f"[peers] llama.cpp must be able to run {path}, got no context.")
        self._vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def logits(self, tokens: Sequence[int]) -> Logits:
        """Of the last of some tokens, ``[vocabulary]``."""
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        return self._step(tokens).copy()

    def prefill(self, tokens: Sequence[int]) -> float:
        """Seconds until the first token after a prompt."""
        start = time.perf_counter()
        int(self.logits(tokens).argmax())
        return time.perf_counter() - start

    def decode(self, context: Sequence[int], count: int) -> float:
        """Seconds for ``count`` tokens after a context and the first."""
        token = int(self.logits(context).argmax())
        start = time.perf_counter()
        for _ in range(count):
            token = int(self._step([token]).argmax())
        return time.perf_counter() - start

    def _step(self, tokens: Sequence[int]) -> Logits:
        array = (self._lib.llama_token * len(tokens))(*tokens)
        failed = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(array, len(tokens)))
        if failed:
            raise RuntimeError(f"[peers] llama_decode must succeed, got {failed}.")
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, shape=(self._vocabulary,))


class Remote:
    """A subject in a process of its own; its methods are called by name, one at a time.

    Args:
        subject: its class.
        arguments: of the class.
    """

    def __init__(self, subject: type, *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, subject, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self._answer()

    def __call__(self, method: str, *arguments: Any) -> Any:
        """What the method returns; RuntimeError with the traceback of what it raises."""
        self._ours.send((method, arguments))
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._ours.close()
        self._process.join()

    def _answer(self) -> Any:
        try:
            failure, value = self._ours.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"[peers] a process ended by itself, exit code {self._process.exitcode}."
            ) from None
        if failure:
            raise RuntimeError(failure)
        return value


def _serve(connection: Any, subject: type, arguments: Sequence[Any]) -> None:
    try:
        instance = subject(*arguments)
        connection.send((None, None))
        while True:
            method, given = connection.recv()
            connection.send((None, getattr(instance, method)(*given)))
    except EOFError:
        pass  # the other end has closed: no more work
    except BaseException:
        connection.send((traceback.format_exc(), None))


def keep_busy() -> None:
    """What another program does that wants a core for itself: for ever."""
    while True:
        pass
