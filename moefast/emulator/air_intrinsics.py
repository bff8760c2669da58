"""The functions Apple's compiled kernels call, ``air.*``, written as LLVM IR.

Arithmetic becomes instructions; functions that are not exact come from the runtime; simdgroup operations from
msl/air.h; barriers and threads from the scheduler. Each is made for the types the kernel declares it with.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from .ir import split_top

_DECLARE = re.compile(r"^declare\s+(.*?)@(air\.[\w.]+)\((.*)\)(.*)$")
_LLVM = {"f32": "float", "f16": "half", "bf16": "bfloat", "f64": "double"}

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
_SIMD = re.compile(r"(simd|quad)_(?!active|is_)\w+")


class UnknownIntrinsicError(ValueError):
    """A function that the emulator does not supply; the message names it."""


def lower(text: str) -> str:
    """A module's IR in which every ``air.*`` declaration has become a definition.

    Raises:
        UnknownIntrinsicError: one that is not known.
    """
    kept, made = [], []
    helpers: set[str] = set()
    for line in text.split("\n"):
        found = _DECLARE.match(line)
        if not found:
            # What the optimiser was told of the functions may not hold of their definitions:
            # above all, that a
            # simdgroup operation touches no memory and may move.
            kept.append(re.sub(r"\) #\d+", ")", line) if "@air." in line else line)
            continue
        result = _bare(found[1])
        arguments = [_bare(argument) for argument in split_top(found[3])] if found[3] else []
        body, needed = _Intrinsic(found[2], result, arguments).define()
        parameters = ", ".join(f"{kind} %{i}" for i, kind in enumerate(arguments))
        made.append(
            f"define internal {result} @{found[2]}({parameters}) convergent alwaysinline {{\n{body}\n}}"
        )
        helpers |= needed
    declared = {
        line.split("@")[1].split("(")[0] for line in kept if line.startswith("declare") and "@" in line
    }
    helpers = {helper for helper in helpers if helper.split("@")[1].split("(")[0] not in declared}
    return "\n".join([*kept, *sorted(helpers), *made])


def _bare(kind: str) -> str:
    """A type without its attributes."""
    words = re.sub(
        r'"[^"]*"|\b(?:noundef|zeroext|signext|local_unnamed_addr|captures\([^)]*\)|readonly|writeonly|nocapture'
        r"|readnone|nonnull|noalias|immarg|align \d+"
        r"|dereferenceable\(\d+\)|dso_local|weak|internal|returned)\b",
        "",
        kind,
    )
    return " ".join(words.split())


class _Intrinsic:
    def __init__(self, name: str, result: str, arguments: list[str]) -> None:
        self.name = name
        self.result = result
        self.arguments = arguments
        parts = name.removeprefix("air.").split(".")
        self.operation = parts[0].removeprefix("fast_").removeprefix("precise_")
        self.suffixes = parts[1:]
        self.helpers: set[str] = set()
        self.lines: list[str] = []
        self.count = 0

    def define(self) -> tuple[str, set[str]]:
        value = self._value()
        self.lines.append("  ret void" if self.result == "void" else f"  ret {self.result} {value}")
        return "\n".join(self.lines), self.helpers

    def emit(self, text: str) -> str:
        self.count += 1
        self.lines.append(f"  %t{self.count} = {text}")
        return f"%t{self.count}"

    def call(self, result: str, function: str, *typed: str) -> str:
        kinds = ", ".join(_leading(argument) for argument in typed)
        convergent = (
            " convergent" if function.startswith("msl_") and function.split("_")[1] not in _RUNTIME else ""
        )
        self.helpers.add(f"declare {result} @{function}({kinds}){convergent}")
        text = f"call {result} @{function}({', '.join(typed)})"
        if result == "void":
            self.lines.append(f"  {text}")
            return ""
        return self.emit(text)

    def _value(self) -> str:
        operation, result = self.operation, self.result
        special: dict[str, Callable[[], str]] = {
            "convert": self._convert,
            "wg": self._barrier,
            "simdgroup": self._barrier,
            "atomic": self._atomic,
            "clamp": self._clamp,
            "ldexp": self._ldexp,
            "fract": self._fract,
            "dot": self._dot,
        }
        if operation in special:
            return special[operation]()
        if operation.startswith("simdgroup_matrix_8x8"):
            return self._matrix()
        if operation == "is_uniform":
            return "true"
        if operation == "normalize_function_constant_predicate":
            return self.emit(f"icmp ne {self.arguments[0]} %0, 0") if result == "i1" else "%0"
        if operation in ("get_simdgroup_size", "get_threads_per_simdgroup"):
            return "32"
        if _SIMD.fullmatch(operation):
            return self._simd()
        if operation in ("min", "max", "abs", "popcount", "clz", "ctz", "mul_hi", "reverse_bits", "rotate"):
            return self._integer()
        if operation == "fma":
            # Fused and rounded once by contraction.py, whatever the type.
            return self.call(result, f"llvm.fmuladd.{_overload(result)}", *self._typed())
        if operation in ("fmin3", "fmax3", "fmedian3"):
            return self._of_three(operation)
        if operation == "divide":
            return self.emit(f"fdiv {result} %0, %1")
        if operation in _EXACT:
            return self.call(result, f"llvm.{_EXACT[operation]}.{_overload(result)}", *self._typed())
        if operation in _RUNTIME:
            return self._by_lanes(lambda *values: self._float(operation, values))
        raise UnknownIntrinsicError(f"[air] {self.name} is not supplied by the emulator.")

    def _typed(self) -> list[str]:
        return [f"{kind} %{i}" for i, kind in enumerate(self.arguments)]

    def _by_lanes(self, make: Callable[..., str]) -> str:
        """A vector function, lane by lane; ``make`` takes and gives values of the element type."""
        vector = re.fullmatch(r"<(\d+) x (\w+)>", self.result)
        if not vector:
            return make(*(f"%{i}" for i in range(len(self.arguments))))
        value = "poison"
        for lane in range(int(vector[1])):
            parts = [
                self.emit(f"extractelement {kind} %{i}, i32 {lane}") for i, kind in enumerate(self.arguments)
            ]
            value = self.emit(f"insertelement {self.result} {value}, {vector[2]} {make(*parts)}, i32 {lane}")
        return value

    def _float(self, function: str, values: tuple[str, ...]) -> str:
        element = self.result.split(" x ")[-1].rstrip(">")
        if element != "float":
            values = tuple(self.emit(f"fpext {element} {value} to float") for value in values)
        value = self.call("float", f"msl_{function}", *(f"float {value}" for value in values))
        return value if element == "float" else self.emit(f"fptrunc float {value} to {element}")

    def _convert(self) -> str:
        to, source = self.suffixes[0], self.suffixes[2]
        result, kind = self.result, self.arguments[0]
        if to == "f" and source == "f":
            wide, narrow = _bits(result), _bits(kind)
            if result == kind:
                return "%0"
            if wide == narrow:  # half and bfloat
                float_ = result.replace(_element(result), "float")
                middle = self.emit(f"fpext {kind} %0 to {float_}")
                return self.emit(f"fptrunc {float_} {middle} to {result}")
            return self.emit(f"{'fpext' if wide > narrow else 'fptrunc'} {kind} %0 to {result}")
        if to == "f":
            return self.emit(f"{'sitofp' if source == 's' else 'uitofp'} {kind} %0 to {result}")
        if source == "f":
            if _element(result) == "i1":
                return self.emit(f"fcmp une {kind} %0, zeroinitializer")
            # Apple's GPUs saturate.
            function = f"llvm.fpto{to}i.sat.{_overload(result)}.{_overload(kind)}"
            return self.call(result, function, f"{kind} %0")
        if result == kind:
            return "%0"
        if _element(result) == "i1":
            return self.emit(f"icmp ne {kind} %0, zeroinitializer")
        if _bits(result) < _bits(kind):
            return self.emit(f"trunc {kind} %0 to {result}")
        return self.emit(f"{'sext' if source == 's' else 'zext'} {kind} %0 to {result}")

    def _integer(self) -> str:
        kind, sign = self.result, self.suffixes[0]
        overload = _overload(kind)
        if self.operation in ("min", "max"):
            return self.call(
                kind, f"llvm.{'u' if sign == 'u' else 's'}{self.operation}.{overload}", *self._typed()
            )
        if self.operation == "abs":
            return "%0" if sign == "u" else self.call(kind, f"llvm.abs.{overload}", f"{kind} %0", "i1 false")
        if self.operation in ("clz", "ctz"):
            return self.call(
                kind,
                f"llvm.{'ctlz' if self.operation == 'clz' else 'cttz'}.{overload}",
                f"{kind} %0",
                "i1 false",
            )
        if self.operation == "popcount":
            return self.call(kind, f"llvm.ctpop.{overload}", f"{kind} %0")
        if self.operation == "reverse_bits":
            return self.call(kind, f"llvm.bitreverse.{overload}", f"{kind} %0")
        if self.operation == "rotate":
            return self.call(kind, f"llvm.fshl.{overload}", f"{kind} %0", f"{kind} %0", f"{kind} %1")
        bits = _bits(kind)
        wide = kind.replace(f"i{bits}", f"i{2 * bits}")
        extend = "zext" if sign == "u" else "sext"
        left, right = (self.emit(f"{extend} {kind} %{i} to {wide}") for i in (0, 1))
        product = self.emit(f"mul {wide} {left}, {right}")
        if "<" in kind:
            raise UnknownIntrinsicError(f"[air] {self.name} is not supplied by the emulator.")
        return self.emit(f"trunc {wide} {self.emit(f'lshr {wide} {product}, {bits}')} to {kind}")

    def _clamp(self) -> str:
        kind, overload = self.result, _overload(self.result)
        if self.suffixes[0] in ("s", "u"):
            low, high = f"llvm.{self.suffixes[0]}max.{overload}", f"llvm.{self.suffixes[0]}min.{overload}"
        else:
            low, high = f"llvm.maxnum.{overload}", f"llvm.minnum.{overload}"
        raised = self.call(kind, low, f"{kind} %0", f"{kind} %1")
        return self.call(kind, high, f"{kind} {raised}", f"{kind} %2")

    def _of_three(self, operation: str) -> str:
        kind, overload = self.result, _overload(self.result)
        low, high = f"llvm.minnum.{overload}", f"llvm.maxnum.{overload}"

        def of(function: str, a: str, b: str) -> str:
            return self.call(kind, function, f"{kind} {a}", f"{kind} {b}")

        if operation != "fmedian3":
            function = low if operation == "fmin3" else high
            return of(function, "%0", of(function, "%1", "%2"))
        return of(high, of(low, "%0", "%1"), of(low, of(high, "%0", "%1"), "%2"))

    def _ldexp(self) -> str:
        if self.result != "float":
            raise UnknownIntrinsicError(f"[air] {self.name} is not supplied by the emulator.")
        return self.call("float", "msl_ldexp", "float %0", "i32 %1")

    def _fract(self) -> str:
        whole = self.call(self.result, f"llvm.floor.{_overload(self.result)}", f"{self.result} %0")
        return self.emit(f"fsub {self.result} %0, {whole}")

    def _dot(self) -> str:
        """In the order of msl/geometric.h, which is not known of Apple's."""
        vector, element = self.arguments[0], self.result
        value = ""
        for lane in range(int(vector[1:].split(" ")[0])):
            left, right = (self.emit(f"extractelement {vector} %{i}, i32 {lane}") for i in (0, 1))
            if lane == 0:
                value = self.emit(f"fmul {element} {left}, {right}")
                continue
            typed = (f"{element} {operand}" for operand in (left, right, value))
            value = self.call(element, f"llvm.fmuladd.{_overload(element)}", *typed)
        return value

    def _barrier(self) -> str:
        function = "msl_threadgroup_barrier" if self.operation == "wg" else "msl_simd_barrier"
        self.call("void", function, "i32 %0", "i32 0")
        return ""

    def _in_memory(self, kind: str, value: str) -> str:
        slot = self.emit(f"alloca {kind}, align 16")
        self.lines.append(f"  store {kind} {value}, ptr {slot}")
        return f"ptr {slot}"

    def _simd(self) -> str:
        suffix = "_".join(self.suffixes)
        votes = self.operation in ("simd_any", "simd_all", "simd_ballot")
        if votes:
            suffix = ""
        elif suffix.startswith("i"):
            suffix = f"u_{suffix}"  # moves do not care
        slots = []
        for i, kind in enumerate(self.arguments):
            value = f"%{i}"
            if kind == "i1":
                kind, value = "i8", self.emit(f"zext i1 {value} to i8")
            slots.append(self._in_memory(kind, value))
        held = "i8" if self.result == "i1" else self.result
        out = self.emit(f"alloca {held}, align 16")
        self.call(
            "void", f"msl_air_{self.operation}" + (f"_{suffix}" if suffix else ""), *slots, f"ptr {out}"
        )
        value = self.emit(f"load {held}, ptr {out}")
        return self.emit(f"icmp ne i8 {value}, 0") if self.result == "i1" else value

    def _pair(self, kind: str, value: str) -> str:
        """The two elements a lane holds of a matrix, which AIR has as 64 of which two count."""
        element = _element(kind)
        first = self.emit(f"extractelement {kind} {value}, i32 0")
        second = self.emit(f"extractelement {kind} {value}, i32 1")
        pair = self.emit(f"insertelement <2 x {element}> poison, {element} {first}, i32 0")
        pair = self.emit(f"insertelement <2 x {element}> {pair}, {element} {second}, i32 1")
        return self._in_memory(f"<2 x {element}>", pair)

    def _of_pair(self, values: list[str]) -> str:
        """A matrix of which a lane holds two elements."""
        matrix = "poison"
        for lane, value in enumerate(values):
            matrix = self.emit(
                f"insertelement {self.result} {matrix}, {_element(self.result)} {value}, i32 {lane}"
            )
        return matrix

    def _matrix(self) -> str:
        operation = self.operation.removeprefix("simdgroup_matrix_8x8_")
        if operation == "init_filled":
            return self._of_pair(["%0", "%0"])
        if operation == "load":
            kind, space = _element(self.result), self.arguments[0]
            places = self._matrix_places(kind, "%0", space, 1)
            return self._of_pair([self.emit(f"load {kind}, {space} {place}") for place in places])
        if operation == "store":
            kind = _element(self.arguments[0])
            for lane, place in enumerate(self._matrix_places(kind, "%1", self.arguments[1], 2)):
                value = self.emit(f"extractelement {self.arguments[0]} %0, i32 {lane}")
                self.lines.append(f"  store {kind} {value}, {self.arguments[1]} {place}")
            return ""
        if operation != "multiply_accumulate":
            raise UnknownIntrinsicError(f"[air] {self.name} is not supplied by the emulator.")
        element = _element(self.result)
        slots = [self._pair(kind, f"%{i}") for i, kind in enumerate(self.arguments)]
        out = self.emit(f"alloca <2 x {element}>, align 16")
        names = "_".join(suffix.removeprefix("v64") for suffix in self.suffixes)
        self.call("void", f"msl_air_matrix_{names}", *slots, f"ptr {out}")
        pair = self.emit(f"load <2 x {element}>, ptr {out}")
        return self._of_pair(
            [self.emit(f"extractelement <2 x {element}> {pair}, i32 {lane}") for lane in (0, 1)]
        )

    def _matrix_places(self, kind: str, pointer: str, space: str, first: int) -> list[str]:
        """Pointers to the elements that a lane holds.

        From argument ``first`` on: elements in a row, origin, whether transposed.
        The memory is accessed here, not in msl/air.h, so that check mode sees it.
        """
        out = self.emit("alloca <2 x i32>, align 16")
        self.call("void", "msl_air_matrix_place", f"ptr {out}")
        held = self.emit(f"load <2 x i32>, ptr {out}")
        row, column = (
            self.emit(f"zext i32 {self.emit(f'extractelement <2 x i32> {held}, i32 {i}')} to i64")
            for i in (0, 1)
        )
        x, y = (self.emit(f"extractelement <2 x i64> %{first + 1}, i32 {i}") for i in (0, 1))
        places = []
        for i in (0, 1):
            along = self.emit(f"add i64 {column}, {i}")
            y_at = self.emit(f"select i1 %{first + 2}, i64 {along}, i64 {row}")
            x_at = self.emit(f"select i1 %{first + 2}, i64 {row}, i64 {along}")
            skipped = self.emit(f"mul i64 {self.emit(f'add i64 {y_at}, {y}')}, %{first}")
            at = self.emit(f"add i64 {skipped}, {self.emit(f'add i64 {x_at}, {x}')}")
            places.append(self.emit(f"getelementptr {kind}, {space} {pointer}, i64 {at}"))
        return places

    def _atomic(self) -> str:
        """``air.atomic.global.add.u.i32(pointer, value, order, scope, volatile)``, and its kin."""
        operation = self.suffixes[1]
        pointer, kind = self.arguments[0], self.arguments[1]
        align = max(_bits(kind) // 8, 1) if not kind.startswith("ptr") else 4
        if operation == "load":
            return self.emit(
                f"load atomic {self.result}, {pointer} %0 monotonic, align {_bits(self.result) // 8}"
            )
        if operation == "store":
            self.lines.append(f"  store atomic {kind} %1, {pointer} %0 monotonic, align {align}")
            return ""
        if operation == "cmpxchg":
            value = self.arguments[2]
            expected = self.emit(f"load {value}, {kind} %1")
            pair = self.emit(
                f"cmpxchg weak {pointer} %0, {value} {expected}, {value} %2 monotonic monotonic, "
                f"align {_bits(value) // 8}"
            )
            found = self.emit(f"extractvalue {{ {value}, i1 }} {pair}, 0")
            self.lines.append(f"  store {value} {found}, {kind} %1")
            return self.emit(f"extractvalue {{ {value}, i1 }} {pair}, 1") if self.result == "i1" else found
        unsigned = "u" in self.suffixes[2:3]
        rmw = {"add": "add", "sub": "sub", "and": "and", "or": "or", "xor": "xor", "xchg": "xchg"}.get(
            operation
        )
        if operation in ("min", "max"):
            rmw = ("u" if unsigned else "") + operation
        if rmw is None:
            raise UnknownIntrinsicError(f"[air] {self.name} is not supplied by the emulator.")
        if kind in ("float", "half") and rmw in ("add", "sub"):
            rmw = "f" + rmw
        return self.emit(f"atomicrmw {rmw} {pointer} %0, {kind} %1 monotonic, align {align}")


def _leading(typed: str) -> str:
    return typed.rsplit(" ", 1)[0]


def _element(kind: str) -> str:
    return kind.split(" x ")[-1].rstrip(">")


def _bits(kind: str) -> int:
    element = _element(kind)
    return {"float": 32, "half": 16, "bfloat": 16, "double": 64}.get(element) or int(element[1:])


def _overload(kind: str) -> str:
    element = _element(kind)
    name = {"float": "f32", "half": "f16", "bfloat": "bf16", "double": "f64"}.get(element, element)
    return f"v{kind[1:].split(' ')[0]}{name}" if kind.startswith("<") else name
