# SPDX-License-Identifier: Apache-2.0
"""Bytes moved by a compiled program, from its HLO text (`jit(f).lower(...).compile().as_text()`);
loops count as often as they run.

Reads only what XLA prints for every backend: shapes, calls, trip counts, replica groups, and the
compiler's estimated cycles if present.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BITS = {"pred": 8, "token": 0, "opaque": 0, "s4": 4, "u4": 4, "bf16": 16, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(\w+)\[([\d,<=]*)\](\{[^}]*\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = ")
_TRIPS = re.compile(r"known_trip_count[^0-9]{1,12}(\d+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
# cost is counted in the called computations
_INDIRECT = ("while", "conditional", "call", "async-start")
_FREE = frozenset(
    {
        "parameter",
        "constant",
        "tuple",
        "get-tuple-element",
        "bitcast",
        "after-all",
        "partition-id",
        "replica-id",
        "iota",
        "opt-barrier",
        "async-update",
        *_INDIRECT,
    }
)
_NO_WORK = re.compile(r'custom_call_target="(AllocateBuffer|ConcatBitcast)"')
_SLICES = ("dynamic-slice", "slice", "gather")


class Instruction(NamedTuple):
    """One line of HLO: shapes as text, operand names, and the rest of the line."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    rest: str
    root: bool


class Collective(NamedTuple):
    """A collective over mesh axes. sent: bytes per device and step."""

    op: str
    axes: tuple[str, ...]
    times: int
    sent: float


class Cost(NamedTuple):
    """Per device and run. bytes: main memory traffic. cycles: compiler estimate, 0 if none."""

    bytes: float
    cycles: float
    collectives: tuple[Collective, ...]
    endless: int  # loops of unknown trip count, counted once


def cost(text: str, mesh: Mapping[str, int]) -> Cost:
    """Cost of a program compiled for a mesh; mesh: axis names to sizes, in device order."""
    program = Program(text)
    found: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0, 0.0])
    total = cycles = 0.0
    endless = 0
    for computation, each, times, fused in program.walk():
        stem = each.op.removesuffix("-start")
        if stem in COLLECTIVES:
            groups = _groups(each.rest, math.prod(mesh.values()))
            if groups.shape[1] > 1:
                op = "reduce-scatter" if "all-reduce-scatter" in computation else stem
                entry = found[op, _axes(groups, mesh)]
                entry[0] += times
                entry[1] += times * _sent(op, program.read(computation, each), groups.shape[1])
        if fused:
            continue
        endless += each.op == "while" and not program.trips(each)
        stated = _CYCLES.search(each.rest)
        cycles += times * int(stated[1]) if stated else 0
        total += times * program.traffic(computation, each)
    collectives = (Collective(*key, int(times), sent) for key, (times, sent) in found.items())
    return Cost(total, cycles, tuple(sorted(collectives, key=lambda each: -each.sent)), endless)


class Program:
    """The computations of a program by name, and its entry."""

    def __init__(self, text: str) -> None:
        self.entry, self.computations = "", {}
        inside: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = _COMPUTATION.match(line)
            if head:
                inside = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif _INSTRUCTION.match(line):
                each = _parsed(line)
                inside[each.name] = each

    def walk(self) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yields (computation, instruction, how often it runs, whether it is in a fusion) for all
        instructions.
        """
        waiting = [(self.entry, 1, False)]
        while waiting:
            name, times, fused = waiting.pop()
            for each in self.computations.get(name, {}).values():
                yield name, each, times, fused
                if each.op in _INDIRECT or each.op == "fusion":
                    often = times * (self.trips(each) or 1)
                    waiting += [
                        (called, often, fused or each.op == "fusion")
                        for called in _called(each.rest)
                    ]

    def trips(self, each: Instruction) -> int:
        """Trip count of a loop; 0 if unknown. TPU programs give it only as the constant in the
        condition.
        """
        known = _TRIPS.search(each.rest)
        if known or each.op != "while":
            return int(known[1]) if known else 0
        condition = re.search(r"condition=%?([\w.\-]+)", each.rest)
        numbers = [
            int(inner.operands[0])
            for inner in self.computations.get(condition[1], {}).values()
            if inner.op == "constant" and inner.shape.startswith("s32[]")
        ]
        return numbers[0] if len(numbers) == 1 else 0

    def read(self, computation: str, each: Instruction) -> float:
        """Bytes of all operands."""
        known = self.computations[computation]
        return sum(size(known[name].shape) for name in each.operands if name in known)

    def traffic(self, computation: str, each: Instruction) -> float:
        """Bytes of main memory that an instruction reads and writes; only the slice for slices."""
        if each.op in _FREE or each.op.endswith("-done") or _NO_WORK.search(each.rest):
            return 0.0
        known = self.computations[computation]
        operands = [known[name].shape for name in each.operands if name in known]
        if each.op in _SLICES:
            return 2 * size(each.shape, main=True)
        if each.op == "dynamic-update-slice":
            return 2 * size(operands[1], main=True)
        if each.op.endswith("-start"):  # the result includes the operand
            made = next((found for found in _arrays(each.shape) if found not in operands), "")
            read = (
                size(made)
                if each.op == "slice-start" and _in_main(operands[0])
                else sum(size(o, main=True) for o in operands)
            )
            return read + size(made, main=True)
        if each.op == "fusion":
            return self._fusion(each, operands)
        return size(each.shape, main=True) + sum(size(shape, main=True) for shape in operands)

    def _fusion(self, each: Instruction, operands: list[str]) -> float:
        body = self.computations.get(next(iter(_called(each.rest)), ""), {})
        users = defaultdict(list)
        for inner in body.values():
            for place, name in enumerate(inner.operands):
                users[name].append((inner, place))
        total = 0.0
        for inner in body.values():
            if inner.op != "parameter":
                continue
            shape = (
                operands[int(inner.operands[0])]
                if int(inner.operands[0]) < len(operands)
                else inner.shape
            )
            if _in_main(shape):
                total += min(size(shape), _needed(inner.name, users))
        root = next((inner for inner in body.values() if inner.root), each)
        makers = root.operands if root.op == "tuple" else (root.name,)
        for made, name in zip(_arrays(each.shape), makers, strict=False):
            total += _written(body, name, made) if _in_main(made) else 0.0
        return total


def size(shape: str, main: bool = False) -> float:
    """Bytes of a shape as text, tuples summed; `main`: only arrays in main memory."""
    return sum(
        _bits(kind) / 8 * math.prod(int(n.lstrip("<=")) for n in dims.split(",") if n)
        for kind, dims, layout in _ARRAY.findall(shape)
        if not main or "S(" not in layout
    )


def _needed(name: str, users: Mapping[str, list[tuple[Instruction, int]]]) -> float:
    """Bytes that a fusion reads of an operand: only slices where it is sliced, none where it is
    overwritten.
    """
    total = 0.0
    for user, place in users[name]:
        if user.op in _SLICES and place == 0:
            total += size(user.shape)
        elif user.op == "bitcast":
            total += _needed(user.name, users)
        elif not (user.op == "dynamic-update-slice" and place == 0):
            return math.inf
    return total


def _in_main(shape: str) -> bool:
    return "S(" not in shape


def _bits(kind: str) -> int:
    """Bits of an HLO element type; most type names state them, such as f32, s8 and f8e4m3fn."""
    return _BITS.get(kind) or (0 if kind in _BITS else int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind)))


def _arrays(shape: str) -> list[str]:
    return [found[0] for found in _ARRAY.finditer(shape)]


def _written(body: Mapping[str, Instruction], name: str, shape: str) -> float:
    """Bytes that a fusion writes of a result: only the slice if updated in place."""
    made = body.get(name)
    while made is not None and made.op in ("bitcast", "copy") and made.operands:
        made = body.get(made.operands[0])
    if made is not None and made.op == "dynamic-update-slice":
        return size(body[made.operands[1]].shape)
    return size(shape)


def _parsed(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    stop = _closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    shape = re.sub(r"/\*.*?\*/", "", line[head.end() : stop])
    op, _, _ = line[stop:].strip().partition("(")
    start = line.index("(", stop)
    end = _closing(line, start)
    inner = line[start + 1 : end - 1]
    operands = (
        (inner,) if op in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inner))
    )
    return Instruction(head[2], shape, op, operands, line[end:], bool(head[1]))


def _closing(line: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for at in range(start, len(line)):
        depth += (line[at] == "(") - (line[at] == ")")
        if not depth:
            return at + 1
    return len(line)


def _called(rest: str) -> Iterator[str]:
    for kind, names in re.findall(
        r"\b(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
        r"(\{[^}]*\}|%?[\w.\-]+)",
        rest,
    ):
        del kind
        yield from re.findall(r"[\w.\-]+", names)


def _groups(rest: str, devices: int) -> np.ndarray:
    """Device groups that communicate, int [groups, members]; pairs for a permutation."""
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if iota:
        shape, dims, order = (
            [int(n) for n in part.split(",")] if part else None for part in iota.groups()
        )
        return (
            np.arange(math.prod(dims))
            .reshape(dims)
            .transpose(order or range(len(dims)))
            .reshape(shape[0], -1)
        )
    named = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if named:  # axes of the program's mesh, in the same device order
        sizes = {axis: int(number) for axis, number in re.findall(r"'([^']+)'=(\d+)", named[1])}
        over = [axis for axis in sizes if f"'{axis}'" in named[2]]
        order = [
            list(sizes).index(axis)
            for axis in (*(axis for axis in sizes if axis not in over), *over)
        ]
        members = math.prod(sizes[axis] for axis in over)
        return (
            np.arange(math.prod(sizes.values()))
            .reshape(tuple(sizes.values()))
            .transpose(order)
            .reshape(-1, members)
        )
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", rest)
    if not listed:
        return np.arange(devices)[None]
    return np.array(
        [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    )


def _axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    places = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(
        axis for axis, place in zip(mesh, places, strict=True) if (place != place[:, :1]).any()
    )


def _sent(op: str, read: float, members: int) -> float:
    """Bytes that each member sends with ring algorithms; read: bytes it holds."""
    if op == "all-gather":
        return read * (members - 1)
    if op in ("collective-permute", "collective-broadcast"):
        return read
    return read * (members - 1) / members * (2 if op == "all-reduce" else 1)
