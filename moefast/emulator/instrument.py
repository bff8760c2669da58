"""Check mode: every access of device, constant and threadgroup memory reported to the runtime first.

Works on optimised IR, in which pointers still know their address space. A checked access goes through a
pointer
that the runtime returns: the same one, or a harmless place if the access would leave its buffer. Calls of the
runtime get the number of their place in the source, so that no debug information is read when a kernel runs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .inlining import refuse_shared_meetings
from .ir import Module, Site, closing_bracket, leading_type, named_types, split_top, store_bytes
from .rounds import DECLARATION, count_rounds

_SPACES = {1: "device", 2: "constant", 3: "threadgroup", 4: "generic"}
_LOAD = re.compile(r"^\s*%[\w.]+ = load (atomic )?(?:volatile )?(.+)$")
_STORE = re.compile(r"^\s*store (atomic )?(?:volatile )?(.+)$")
_POINTER = re.compile(r"ptr addrspace\((\d)\) (.+)$")
_UPDATE = re.compile(
    r"^\s*%[\w.]+ = (?:atomicrmw (?:volatile )?\w+|cmpxchg (?:weak )?(?:volatile )?)\s*"
    r"ptr addrspace\((\d)\) (.+)$"
)
_COPY = re.compile(r"call void @llvm\.(memcpy|memmove|memset)\.(?:inline\.)?p(\d)")
_RUNTIME = re.compile(
    r"call .*@msl_(?:simd_exchange|simd_barrier|threadgroup_barrier|threadgroup_variable)\("
)
_ALIGN = re.compile(r", align (\d+)")
_ORDER = re.compile(r'( syncscope\("[^"]*"\))? (unordered|monotonic|acquire|release|acq_rel|seq_cst)$')
_LABEL = re.compile(r'^([\w.$-]+|"[^"]+"):')
_DIRECT = {1, 2, 4, 8, 16}


@dataclass
class Instrumented:
    """IR with checks, and the places its site numbers stand for; site 0 is none."""

    ir: str
    sites: list[Site] = field(default_factory=list)


class _Instrumenter:
    def __init__(self, text: str) -> None:
        self.module = Module(text)
        self.types = named_types(self.module.lines)
        self.sites: list[Site] = [Site(())]
        self.numbers: dict[str | None, int] = {}
        self.temporaries = 0
        self.declared: set[str] = set()
        self.held: list[str] = []  # of the present function: what goes to its start
        self.out: list[str] = []

    def run(self) -> Instrumented:
        # Constructors of globals run when the library is loaded, before there is anything to check.
        checked = [body for body in self.module.bodies if not body.name.startswith("_GLOBAL__sub_I")]
        inside = {i for body in checked for i in range(body.first + 1, body.last)}
        before: dict[int, list[str]] = {}
        refuse_shared_meetings(self.module)
        for body in checked:
            before.update(count_rounds(self.module, body).before)
        if before:
            self.declared.add(DECLARATION)
        location: str | None = None
        start = 0
        for i, line in enumerate(self.module.lines):
            self.out += before.get(i, [])
            if i not in inside:
                location = None
                if self.held:
                    start += bool(_LABEL.match(self.out[start]))
                    self.out[start:start] = self.held
                    self.held.clear()
                start = len(self.out) + 1
                self.out.append(line)
                continue
            # An instruction the optimiser left without a place gets that of the one before it.
            location = self.module.location(i) or location
            self.out.append(self._instruction(line, location))
        return Instrumented("\n".join([*self.out, *self._declarations(), *self._constants()]), self.sites)

    def _site(self, location: str | None) -> int:
        if location not in self.numbers:
            self.numbers[location] = len(self.sites)
            self.sites.append(self.module.site(location))
        return self.numbers[location]

    def _instruction(self, line: str, location: str | None) -> str:
        if "addrspace(" in line:
            load = _LOAD.match(line)
            if found := load or _STORE.match(line):
                # A pointer may be an expression with types and commas of its own.
                value, operand, *rest = split_top(found[2])
                pointer = _POINTER.match(operand)
                if not pointer:
                    return line  # to or from a thread's own variable
                kind = ("atomic_" if found[1] else "") + ("load" if load else "store")
                size = store_bytes(leading_type(value), self.types)
                after = ", ".join([pointer[2], *rest])
                stored = value if kind == "store" else ""
                return self._access(line, kind, size, int(pointer[1]), after, location, stored)
            if found := _UPDATE.match(line):
                operands = split_top(found[2])
                size = store_bytes(leading_type(operands[1]), self.types)
                return self._access(line, "atomic", size, int(found[1]), found[2], location)
        if _COPY.search(line):
            return self._copy(line, location)
        if _RUNTIME.search(line):
            # Every such call ends with its place, 0 so far.
            head, tail = (
                line.rsplit("i32 noundef 0)", 1) if "i32 noundef 0)" in line else line.rsplit("i32 0)", 1)
            )
            return f"{head}i32 {self._site(location)}){tail}"
        return line

    def _access(
        self, line: str, kind: str, size: int, space: int, rest: str, location: str | None, value: str = ""
    ) -> str:
        operand = _ORDER.sub("", split_top(rest)[0])
        if space == 0 or space not in _SPACES or (space == 2 and operand.startswith(("@", "getelementptr"))):
            return line  # the module's own constants, at a fixed place
        align = _ALIGN.search(rest)
        alignment = align[1] if align else "1"
        function = f"msl_check_{_SPACES[space]}_{kind}"
        arguments = f"ptr addrspace({space}) {operand}"
        first = ""
        bits = self._bits(value, size) if value else None
        if size in _DIRECT and (bits or not value):
            function += f"_{size}"
            self._declare(function, space, f"i{8 * size}, i32, i32" if bits else "i32, i32")
            if bits:
                first, operand_bits = bits
                arguments += f", i{8 * size} {operand_bits}"
        elif value:
            # Compared where it lies: a store needs no type for that.
            held = self._temporary()
            self.held.append(f"  {held} = alloca {leading_type(value)}, align 16")
            first = f"  store {value.strip()}, ptr {held}, align 16\n"
            function = function.replace("_store", "_copy_n")
            arguments += f", ptr {held}, i64 {size}"
            self._declare(function, space, "ptr, i64, i32, i32")
        else:
            function += "_n"
            arguments += f", i64 {size}"
            self._declare(function, space, "i64, i32, i32")
        arguments += f", i32 {alignment}, i32 {self._site(location)}"
        pointer = f"ptr addrspace({space}) "
        before, after = line.split(pointer + operand, 1)
        checked = self._temporary()
        call = f"  {checked} = call ptr addrspace({space}) @{function}({arguments}){_debug(line)}"
        if not kind.startswith("atomic"):
            # What is misaligned is reported, and must not fault.
            after = _ALIGN.sub(", align 1", after)
        return f"{first}{call}\n{before}{pointer}{checked}{after}"

    def _bits(self, value: str, size: int) -> tuple[str, str] | None:
        """An instruction that makes a stored value an integer, and the integer; None for aggregates."""
        kind = leading_type(value)
        operand = value.strip()[len(kind) :].strip()
        if kind.startswith("ptr"):
            kind, operand = value.strip().rsplit(" ", 1)
        if kind == f"i{8 * size}":
            return "", operand
        if kind[0] in "[{%" or (kind.startswith("i") and kind != f"i{8 * size}"):
            return None
        name = self._temporary()
        cast = "ptrtoint" if kind.startswith("ptr") else "bitcast"
        return f"  {name} = {cast} {kind} {operand} to i{8 * size}\n", name

    def _copy(self, line: str, location: str | None) -> str:
        head, arguments = line.split("(", 1)
        closing = closing_bracket(arguments)
        parts = split_top(arguments[:closing])
        size = parts[2].split()[-1]
        calls = []
        pointers = [(0, "store")] if ".memset" in head else [(1, "load"), (0, "store")]
        for position, kind in pointers:
            words = parts[position].split()
            found = re.match(r"ptr addrspace\((\d)\)", parts[position])
            if (
                not found
                or int(found[1]) not in _SPACES
                or (int(found[1]) == 2 and words[-1].startswith("@"))
            ):
                continue
            space = int(found[1])
            align = re.search(r"align (\d+)", parts[position])
            function = f"msl_check_{_SPACES[space]}_{kind}_n"
            checked = self._temporary()
            width = parts[2].split()[0]
            if width != "i64":
                wide = self._temporary()
                calls.append(f"  {wide} = zext {width} {size} to i64")
            else:
                wide = size
            operand = _last_operand(parts[position])
            source, taken = "", ""
            if kind == "store" and len(pointers) == 2:
                # What is copied comes along, as the value of a store does.
                function, taken = function.replace("_store_n", "_copy_n"), "ptr, "
                source = self._generic(parts[1], calls)
            elif kind == "store":
                function, taken = function.replace("_store_n", "_fill_n"), "i8, "
                source = f"i8 {parts[1].split()[-1]}, "
            self._declare(function, space, f"{taken}i64, i32, i32")
            calls.append(
                f"  {checked} = call ptr addrspace({space}) @{function}("
                f"ptr addrspace({space}) {operand}, {source}i64 {wide}, "
                f"i32 {align[1] if align else 1}, i32 {self._site(location)}){_debug(line)}"
            )
            unaligned = re.sub(r"\balign \d+", "align 1", parts[position].removesuffix(operand))
            parts[position] = unaligned + checked
        return "\n".join([*calls, f"{head}({', '.join(parts)}{arguments[closing:]}"])

    def _generic(self, argument: str, calls: list[str]) -> str:
        """A pointer argument as an argument without address space."""
        operand = _last_operand(argument)
        found = re.match(r"ptr addrspace\((\d)\)", argument)
        if not found:
            return f"ptr {operand}, "
        name = self._temporary()
        calls.append(f"  {name} = addrspacecast ptr addrspace({found[1]}) {operand} to ptr")
        return f"ptr {name}, "

    def _temporary(self) -> str:
        self.temporaries += 1
        return f"%msl.checked.{self.temporaries}"

    def _declare(self, function: str, space: int, rest: str) -> None:
        self.declared.add(f"declare ptr addrspace({space}) @{function}(ptr addrspace({space}), {rest})")

    def _declarations(self) -> list[str]:
        return sorted(self.declared)

    def _constants(self) -> list[str]:
        """A table of the module's constants: reads of them are no reads of a buffer."""
        pattern = re.compile(r"^(@[\w.$-]+|@\"[^\"]+\") = .*addrspace\(2\) constant (.+)$")
        rows = []
        for line in self.module.lines:
            if line.startswith("@") and (found := pattern.match(line)) and " external " not in line:
                size = f"ptrtoint (ptr getelementptr ({leading_type(found[2])}, ptr null, i64 1) to i64)"
                rows.append(f"{{ ptr addrspace(2), i64 }} {{ ptr addrspace(2) {found[1]}, i64 {size} }}")
        table = f"[{len(rows)} x {{ ptr addrspace(2), i64 }}]"
        value = f"[{', '.join(rows)}]" if rows else "zeroinitializer"
        return [
            f"@msl_constants = constant {table} {value}",
            f"@msl_constant_count = constant i64 {len(rows)}",
        ]


def _last_operand(text: str) -> str:
    """The operand of ``ptr addrspace(1) align 4 %p``, constant expressions included."""
    at = text.find("getelementptr")
    return text[at:] if at >= 0 else text.split()[-1]


def _debug(line: str) -> str:
    found = re.search(r", !dbg !\d+", line)
    return found[0] if found else ""


def instrument(text: str) -> Instrumented:
    """Optimised IR with a check before every access that can go wrong."""
    return _Instrumenter(text).run()
