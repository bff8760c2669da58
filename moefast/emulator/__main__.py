"""Check one Metal kernel from the shell: ``python -m moefast.emulator FILE.metal --kernel K ...``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from . import CompileError, EmulatorError, Kernel, Output, Result, ToolchainError, compile, launch
from .metal_kernel import mlx_include_dir

_EXAMPLES = """examples:
  # does it compile? what does it take?
  python -m moefast.emulator scale.metal
  # run it on 1024 random floats and look for errors; buffer 1 is written
  python -m moefast.emulator scale.metal --kernel scale --grid 1024 --threadgroup 256 \\
      --buffer 0=normal:float32:1024 --buffer 1=empty:float32:1024 --buffer 2=3:int32
  # arrays from files, findings and counters as JSON, several random schedules
  python -m moefast.emulator scale.metal --kernel scale --grid 1024 --threadgroup 256 \\
      --buffer 0=x.npy --buffer 1=empty:float32:1024 --buffer 2=3:int32 --seeds 4 --json

buffers, INDEX=WHAT:
  FILE.npy               an array
  zeros:DTYPE:SHAPE      zeros; SHAPE is 4 or 4x8
  normal:DTYPE:SHAPE     normal random numbers (integers: 0 to 9), the same in every run
  empty:DTYPE:SHAPE      an output: reading what nobody wrote is a finding
  VALUE[,VALUE...]:DTYPE the values themselves

DTYPE is NumPy's name of a type, or bfloat16 (files hold its bits as uint16).

exit status: 0 clean, 1 findings, 2 it does not compile or cannot be launched; with --json the reasons why it
does not compile are "diagnostics"
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moefast.emulator",
        description="Compile a Metal kernel as strictly as Apple's compiler, run it on the CPU and check it.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", type=Path, help="Metal source")
    parser.add_argument("--kernel", help="its name, if there are several")
    parser.add_argument("--grid", type=_sizes, help="threads: X or X,Y or X,Y,Z; without it, compile only")
    parser.add_argument("--threadgroup", type=_sizes, default=(32, 1, 1), help="threads of a threadgroup")
    parser.add_argument("--buffer", action="append", default=[], metavar="INDEX=WHAT", help="see below")
    parser.add_argument("--threadgroup-bytes", action="append", default=[], metavar="INDEX=BYTES")
    parser.add_argument(
        "--constant", action="append", default=[], metavar="INDEX=VALUE", help="function constant"
    )
    parser.add_argument(
        "-I", "--include", action="append", default=[], help="folder of headers; MLX's are found"
    )
    parser.add_argument("-D", "--define", action="append", default=[], metavar="NAME[=VALUE]")
    parser.add_argument("--mode", choices=("check", "run"), default="check")
    parser.add_argument(
        "--seeds", type=int, default=0, help="that many random schedules besides the plain one"
    )
    parser.add_argument("--time-limit", type=float, default=60.0, help="seconds for each launch")
    parser.add_argument(
        "--allow-equal-writes", action="store_true", help="unordered writes of the same bytes are no findings"
    )
    parser.add_argument("--denormals", choices=("keep", "flush"), default="keep", help="of float and bfloat")
    parser.add_argument("--save", action="append", default=[], metavar="INDEX=FILE.npy", help="keep a buffer")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    return parser


def _sizes(text: str) -> tuple[int, int, int]:
    sizes = [int(part) for part in text.split(",")]
    if not 1 <= len(sizes) <= 3:
        raise argparse.ArgumentTypeError(f"one to three sizes, got {text!r}")
    x, y, z = [*sizes, 1, 1][:3]
    return x, y, z


def _pairs(options: list[str], name: str) -> dict[str, str]:
    found = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not equals:
            raise ValueError(f"[emulator] {name} must be KEY=VALUE, got {option!r}.")
        found[key] = value
    return found


def _number(text: str) -> bool | int | float:
    if text in ("true", "false"):
        return text == "true"
    try:
        return int(text, 0)
    except ValueError:
        return float(text)


def _buffer(what: str, index: int) -> np.ndarray | Output:
    if what.endswith(".npy"):
        return np.ascontiguousarray(np.load(what))
    kind, _, rest = what.partition(":")
    try:
        if kind not in ("zeros", "normal", "empty"):
            return _as([_number(value) for value in kind.split(",")], rest or "float32")
        dtype, _, shape_text = rest.partition(":")
        shape = tuple(int(size) for size in shape_text.split("x"))
        if kind == "empty":
            return Output(shape, _as(0, dtype).dtype)
        if kind == "zeros":
            return _as(np.zeros(shape), dtype)
        rng = np.random.default_rng(index)
        whole = np.issubdtype(_as(0, dtype).dtype, np.integer) and dtype != "bfloat16"
        return _as(rng.integers(0, 10, shape) if whole else rng.standard_normal(shape), dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"[emulator] --buffer must be as --help has it, got {what!r}: {error}.") from None


def _as(values: Any, dtype: str) -> np.ndarray:
    """An array; of bfloat16, for which NumPy has no name, the bits."""
    if dtype != "bfloat16":
        return np.asarray(values).astype(dtype)
    rounded = mx.array(np.asarray(values, np.float32)).astype(mx.bfloat16)
    return np.array(rounded.reshape(-1).view(mx.uint16)).reshape(rounded.shape)


def _describe(kernel: Kernel) -> dict[str, Any]:
    rows = [
        {"name": p.name, "kind": p.kind, "index": p.index, "space": p.space, "writable": p.writable}
        for p in kernel.signature.parameters
        if p.kind != "builtin"
    ]
    return {"kernel": kernel.name, "parameters": rows}


def _launches(kernel: Kernel, arguments: argparse.Namespace) -> list[Result]:
    sizes = {int(k): int(v) for k, v in _pairs(arguments.threadgroup_bytes, "--threadgroup-bytes").items()}
    results = []
    for seed in [None, *range(1, arguments.seeds + 1)]:
        given = _pairs(arguments.buffer, "--buffer")
        buffers = {int(index): _buffer(what, int(index)) for index, what in given.items()}
        results.append(
            launch(
                kernel,
                buffers,
                arguments.grid,
                arguments.threadgroup,
                mode=arguments.mode,
                threadgroup_bytes=sizes,
                raises=False,
                seed=seed,
                time_limit=arguments.time_limit,
                denormals=arguments.denormals,
                allow_equal_writes=arguments.allow_equal_writes,
            )
        )
    for index, file in _pairs(arguments.save, "--save").items():
        np.save(file, results[0].buffers[int(index)])
    return results


def _report(kernel: Kernel, results: list[Result], as_json: bool) -> int:
    findings = {(f.kind, f.place, f.buffer): f for result in results for f in result.findings}
    first = results[0]
    orders = {b"".join(array.tobytes() for array in result.buffers.values()) for result in results}
    if as_json:
        data = {
            **_describe(kernel),
            "findings": [finding.data() for finding in findings.values()],
            "counters": first.counters.data(),
            "seconds": first.seconds,
            "schedules": len(results),
            "different_results": len(orders),
        }
        print(json.dumps(data, indent=2))
    else:
        for finding in findings.values():
            print(finding)
        c = first.counters
        print(
            f"{kernel.name}: {len(findings)} finding{'' if len(findings) == 1 else 's'}, "
            f"{c.threads} threads, {c.threadgroups} threadgroups,",
            end=" ",
        )
        print(f"{c.barriers} barriers, {c.simd_operations} simd operations, {first.seconds * 1e3:.1f} ms")
        for name, b in c.buffers.items():
            print(f"  {name}: {b.loaded} bytes loaded, {b.stored} stored, {b.unique} of them distinct")
        if len(orders) > 1:
            print(f"  {len(results)} schedules gave {len(orders)} different results")
    return 1 if findings or len(orders) > 1 else 0


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        kernel = compile(
            arguments.file.read_text(),
            arguments.kernel,
            function_constants={
                int(k) if k.isdecimal() else k: _number(v)
                for k, v in _pairs(arguments.constant, "--constant").items()
            },
            include_dirs=[arguments.file.parent, *arguments.include, mlx_include_dir()],
            defines=dict(
                option.split("=", 1) if "=" in option else (option, "1") for option in arguments.define
            ),
            name=str(arguments.file),
        )
        if arguments.grid is None:
            print(json.dumps(_describe(kernel), indent=2) if arguments.json else _text(kernel))
            return 0
        return _report(kernel, _launches(kernel, arguments), arguments.json)
    except EmulatorError as error:
        findings = [finding.data() for finding in error.findings]
        print(json.dumps({"findings": findings}, indent=2) if arguments.json else error)
        return 1
    except CompileError as error:
        if arguments.json:
            print(json.dumps({"diagnostics": [asdict(found) for found in error.diagnostics]}, indent=2))
        else:
            print(error, file=sys.stderr)
        return 2
    except (ToolchainError, ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2


def _text(kernel: Kernel) -> str:
    lines = [f"{kernel.name} compiles; it takes"]
    for row in _describe(kernel)["parameters"]:
        access = "written" if row["writable"] else "read"
        lines.append(f"  [[{row['kind']}({row['index']})]] {row['space']} {row['name']}, {access}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
