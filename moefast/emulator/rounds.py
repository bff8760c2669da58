"""In which round of its loops a thread waits: what tells one execution of a barrier from another.

Threads of a threadgroup must meet at the same execution of a barrier, not only at the same barrier: Metal
asks for it in each iteration of a loop. A counter goes with every loop around a meeting; before each meeting
the runtime hears the counters of the loops around it, as one number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .inlining import meets
from .ir import Body, Module

_LABEL = re.compile(r'^([\w.$-]+|"[^"]+"):')
_TARGET = re.compile(r'\blabel %([\w.$-]+|"[^"]+")')
_PREDECESSORS = re.compile(r"; preds = (.*)$")
_FACTOR = 0x9E3779B97F4A7C15 - (1 << 64)  # odd, with bits all over


@dataclass
class _Block:
    """Lines ``first`` to ``last`` of the module, the terminator at the end."""

    name: str
    first: int
    last: int
    successors: list[str] = field(default_factory=list)


@dataclass
class _Loop:
    header: str
    latches: list[str]
    blocks: set[str]


@dataclass
class Rounds:
    """Lines to put before lines of the module, by number."""

    before: dict[int, list[str]] = field(default_factory=dict)

    def add(self, line: int, text: str) -> None:
        self.before.setdefault(line, []).append(text)


DECLARATION = "declare void @msl_check_round(i64)"


def count_rounds(module: Module, body: Body) -> Rounds:
    """What to insert into a function, so that each meeting in a loop tells its round."""
    out = Rounds()
    waits = [line for line, callee in module.calls(body) if meets(callee)]
    blocks = _blocks(module, body) if waits else []
    if len(blocks) < 2:
        return out
    by_name = {block.name: block for block in blocks}
    around = {
        line: next(block.name for block in blocks if block.first <= line <= block.last) for line in waits
    }
    loops = [
        loop for loop in _loops(blocks, by_name) if any(block in loop.blocks for block in around.values())
    ]
    loops.sort(key=lambda loop: -len(loop.blocks))  # outer ones first
    predecessors = _predecessors(blocks)
    for number, loop in enumerate(loops):
        _count(module, out, number, by_name[loop.header], loop, predecessors[loop.header])
    for line, block in around.items():
        within = [number for number, loop in enumerate(loops) if block in loop.blocks]
        if within:
            _tell(module, out, line, within)
    return out


def _blocks(module: Module, body: Body) -> list[_Block]:
    starts = [body.first + 1]
    names = {body.first + 1: ""}  # the first one's label is not printed, but named as a predecessor
    mentioned: set[str] = set()
    for i in range(body.first + 1, body.last):
        if found := _LABEL.match(module.lines[i]):
            if i > body.first + 1:
                starts.append(i)
            names[i] = found[1]
            if comment := _PREDECESSORS.search(module.lines[i]):
                mentioned |= {name.strip().removeprefix("%") for name in comment[1].split(",")}
    if not names[body.first + 1]:
        names[body.first + 1] = next(iter(mentioned - set(names.values())), "")
    blocks = []
    for start, end in zip(starts, [*starts[1:], body.last], strict=True):
        block = _Block(names[start], start, end - 1)
        # A switch has a line for each case, all after the instruction that starts it.
        for i in range(start, end):
            text = module.lines[i].lstrip()
            if text.startswith(("br ", "switch ")) or block.successors:
                block.successors += _TARGET.findall(text)
        blocks.append(block)
    return blocks


def _predecessors(blocks: list[_Block]) -> dict[str, list[str]]:
    """With one entry for each edge, as a phi wants them."""
    found: dict[str, list[str]] = {block.name: [] for block in blocks}
    for block in blocks:
        for successor in block.successors:
            found[successor].append(block.name)
    return found


def _loops(blocks: list[_Block], by_name: dict[str, _Block]) -> list[_Loop]:
    """Natural loops: an edge to a block that dominates its start, and what lies in between."""
    predecessors = _predecessors(blocks)
    order = _reverse_postorder(blocks[0].name, by_name)
    dominator = _dominators(order, predecessors)
    loops: dict[str, _Loop] = {}
    for name in order:
        for header in by_name[name].successors:
            if _dominates(dominator, header, name):
                loop = loops.setdefault(header, _Loop(header, [], {header}))
                loop.latches.append(name)
                waiting = [name]
                while waiting:
                    block = waiting.pop()
                    if block not in loop.blocks:
                        loop.blocks.add(block)
                        waiting += predecessors[block]
    return list(loops.values())


def _reverse_postorder(entry: str, by_name: dict[str, _Block]) -> list[str]:
    order: list[str] = []
    seen = {entry}
    stack = [(entry, iter(by_name[entry].successors))]
    while stack:
        name, rest = stack[-1]
        following = next((successor for successor in rest if successor not in seen), None)
        if following is None:
            order.append(name)
            stack.pop()
        else:
            seen.add(following)
            stack.append((following, iter(by_name[following].successors)))
    return order[::-1]


def _dominators(order: list[str], predecessors: dict[str, list[str]]) -> dict[str, str]:
    """The immediate dominator of each block that can be reached (Cooper, Harvey and Kennedy)."""
    number = {name: i for i, name in enumerate(order)}
    found = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for name in order[1:]:
            known = [block for block in predecessors[name] if block in found]
            new = known[0]
            for other in known[1:]:
                while new != other:
                    if number[new] > number[other]:
                        new = found[new]
                    else:
                        other = found[other]
            if found.get(name) != new:
                found[name] = new
                changed = True
    return found


def _dominates(dominator: dict[str, str], above: str, below: str) -> bool:
    while below != above:
        if dominator[below] == below:
            return False
        below = dominator[below]
    return True


def _count(
    module: Module, out: Rounds, number: int, header: _Block, loop: _Loop, predecessors: list[str]
) -> None:
    """A counter: 0 where the loop is entered, one more at each return to its header."""
    name = f"%msl.round.{number}"
    values = (f"[ {f'{name}.next' if block in loop.latches else 0}, %{block} ]" for block in predecessors)
    first = header.first + 1  # after the label
    out.add(first, f"  {name} = phi i64 {', '.join(values)}")
    while " = phi " in module.lines[first]:
        first += 1
    out.add(first, f"  {name}.next = add i64 {name}, 1")


def _tell(module: Module, out: Rounds, line: int, loops: list[int]) -> None:
    total = f"%msl.round.{loops[0]}"
    for number in loops[1:]:
        scaled, sum_ = f"%msl.rounds.{line}.{number}.scaled", f"%msl.rounds.{line}.{number}"
        out.add(line, f"  {scaled} = mul i64 {total}, {_FACTOR}")
        out.add(line, f"  {sum_} = add i64 {scaled}, %msl.round.{number}")
        total = sum_
    debug = re.search(r", !dbg !\d+", module.lines[line])
    out.add(line, f"  call void @msl_check_round(i64 {total}){debug[0] if debug else ''}")
