"""Arithmetic of Apple's compiled kernels: instructions of LLVM, or functions of the runtime."""

from __future__ import annotations

from collections.abc import Callable

from .air_builder import Builder, bits, element, overload

# Of one argument, by the name after air.; the runtime has them for float.
_RUNTIME = set(
    [
        "acos",
        "acosh",
        "asin",
        "asinh",
        "atan",
        "atanh",
        "cos",
        "cosh",
        "cospi",
        "exp",
        "exp10",
        "exp2",
        "log",
        "log10",
        "log2",
        "rsqrt",
        "sin",
        "sinh",
        "sinpi",
        "tan",
        "tanh",
        "tanpi",
    ]
) | {"atan2", "fmod", "pow", "powr"}
_EXACT = {
    "fabs": "fabs",
    "floor": "floor",
    "ceil": "ceil",
    "trunc": "trunc",
    "rint": "rint",
    "round": "round",
    "sqrt": "sqrt",
    "fmin": "minnum",
    "fmax": "maxnum",
    "copysign": "copysign",
}
_INTEGER = ("min", "max", "abs", "popcount", "clz", "ctz", "mul_hi", "reverse_bits", "rotate")


def arithmetic(b: Builder) -> str | None:
    """The value of a function of numbers; None where it is none."""
    operation, result = b.operation, b.result
    special: dict[str, Callable[[Builder], str]] = {
        "convert": _convert,
        "clamp": _clamp,
        "ldexp": _ldexp,
        "fract": _fract,
        "dot": _dot,
    }
    if operation in special:
        return special[operation](b)
    if operation in _INTEGER:
        return _integer(b)
    if operation == "fma":
        # Fused and rounded once by contraction.py, whatever the type.
        return b.call(result, f"llvm.fmuladd.{overload(result)}", *b.typed())
    if operation in ("fmin3", "fmax3", "fmedian3"):
        return _of_three(b, operation)
    if operation == "divide":
        return b.emit(f"fdiv {result} %0, %1")
    if operation in _EXACT:
        return b.call(result, f"llvm.{_EXACT[operation]}.{overload(result)}", *b.typed())
    if operation in _RUNTIME:
        return b.by_lanes(lambda *values: _float(b, operation, values))
    return None


def _float(b: Builder, function: str, values: tuple[str, ...]) -> str:
    scalar = element(b.result)
    if scalar != "float":
        values = tuple(b.emit(f"fpext {scalar} {value} to float") for value in values)
    value = b.call("float", f"msl_{function}", *(f"float {value}" for value in values))
    return value if scalar == "float" else b.emit(f"fptrunc float {value} to {scalar}")


def _convert(b: Builder) -> str:
    to, source = b.suffixes[0], b.suffixes[2]
    result, kind = b.result, b.arguments[0]
    if to == "f" and source == "f":
        wide, narrow = bits(result), bits(kind)
        if result == kind:
            return "%0"
        if wide == narrow:  # half and bfloat
            float_ = result.replace(element(result), "float")
            middle = b.emit(f"fpext {kind} %0 to {float_}")
            return b.emit(f"fptrunc {float_} {middle} to {result}")
        return b.emit(f"{'fpext' if wide > narrow else 'fptrunc'} {kind} %0 to {result}")
    if to == "f":
        return b.emit(f"{'sitofp' if source == 's' else 'uitofp'} {kind} %0 to {result}")
    if source == "f":
        if element(result) == "i1":
            return b.emit(f"fcmp une {kind} %0, zeroinitializer")
        # Apple's GPUs saturate.
        function = f"llvm.fpto{to}i.sat.{overload(result)}.{overload(kind)}"
        return b.call(result, function, f"{kind} %0")
    if result == kind:
        return "%0"
    if element(result) == "i1":
        return b.emit(f"icmp ne {kind} %0, zeroinitializer")
    if bits(result) < bits(kind):
        return b.emit(f"trunc {kind} %0 to {result}")
    return b.emit(f"{'sext' if source == 's' else 'zext'} {kind} %0 to {result}")


def _integer(b: Builder) -> str:
    kind, sign = b.result, b.suffixes[0]
    name = overload(kind)
    if b.operation in ("min", "max"):
        return b.call(kind, f"llvm.{'u' if sign == 'u' else 's'}{b.operation}.{name}", *b.typed())
    if b.operation == "abs":
        return "%0" if sign == "u" else b.call(kind, f"llvm.abs.{name}", f"{kind} %0", "i1 false")
    if b.operation in ("clz", "ctz"):
        return b.call(
            kind,
            f"llvm.{'ctlz' if b.operation == 'clz' else 'cttz'}.{name}",
            f"{kind} %0",
            "i1 false",
        )
    if b.operation == "popcount":
        return b.call(kind, f"llvm.ctpop.{name}", f"{kind} %0")
    if b.operation == "reverse_bits":
        return b.call(kind, f"llvm.bitreverse.{name}", f"{kind} %0")
    if b.operation == "rotate":
        return b.call(kind, f"llvm.fshl.{name}", f"{kind} %0", f"{kind} %0", f"{kind} %1")
    width = bits(kind)
    wide = kind.replace(f"i{width}", f"i{2 * width}")
    extend = "zext" if sign == "u" else "sext"
    left, right = (b.emit(f"{extend} {kind} %{i} to {wide}") for i in (0, 1))
    product = b.emit(f"mul {wide} {left}, {right}")
    if "<" in kind:
        raise b.unknown()
    return b.emit(f"trunc {wide} {b.emit(f'lshr {wide} {product}, {width}')} to {kind}")


def _clamp(b: Builder) -> str:
    kind, name = b.result, overload(b.result)
    if b.suffixes[0] in ("s", "u"):
        low, high = f"llvm.{b.suffixes[0]}max.{name}", f"llvm.{b.suffixes[0]}min.{name}"
    else:
        low, high = f"llvm.maxnum.{name}", f"llvm.minnum.{name}"
    raised = b.call(kind, low, f"{kind} %0", f"{kind} %1")
    return b.call(kind, high, f"{kind} {raised}", f"{kind} %2")


def _of_three(b: Builder, operation: str) -> str:
    kind, name = b.result, overload(b.result)
    low, high = f"llvm.minnum.{name}", f"llvm.maxnum.{name}"

    def of(function: str, left: str, right: str) -> str:
        return b.call(kind, function, f"{kind} {left}", f"{kind} {right}")

    if operation != "fmedian3":
        function = low if operation == "fmin3" else high
        return of(function, "%0", of(function, "%1", "%2"))
    return of(high, of(low, "%0", "%1"), of(low, of(high, "%0", "%1"), "%2"))


def _ldexp(b: Builder) -> str:
    if b.result != "float":
        raise b.unknown()
    return b.call("float", "msl_ldexp", "float %0", "i32 %1")


def _fract(b: Builder) -> str:
    whole = b.call(b.result, f"llvm.floor.{overload(b.result)}", f"{b.result} %0")
    return b.emit(f"fsub {b.result} %0, {whole}")


def _dot(b: Builder) -> str:
    """In the order of msl/geometric.h, which is not known of Apple's."""
    vector, scalar = b.arguments[0], b.result
    value = ""
    for lane in range(int(vector[1:].split(" ")[0])):
        left, right = (b.emit(f"extractelement {vector} %{i}, i32 {lane}") for i in (0, 1))
        if lane == 0:
            value = b.emit(f"fmul {scalar} {left}, {right}")
            continue
        typed = (f"{scalar} {operand}" for operand in (left, right, value))
        value = b.call(scalar, f"llvm.fmuladd.{overload(scalar)}", *typed)
    return value
