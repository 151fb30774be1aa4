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
    attributes: str
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
    loops_without_trip_count: int  # loops of unknown trip count, counted once


def cost(text: str, mesh: Mapping[str, int]) -> Cost:
    """Cost of a program compiled for a mesh; mesh: axis names to sizes, in device order."""
    program = Program(text)
    totals: dict[tuple[str, tuple[str, ...]], list[float]] = defaultdict(lambda: [0, 0.0])
    total = cycles = 0.0
    loops_without_trip_count = 0
    for computation, instruction, repeats, fused in program.walk():
        base_op = instruction.op.removesuffix("-start")
        if base_op in COLLECTIVES:
            groups = _device_groups(instruction.attributes, math.prod(mesh.values()))
            if groups.shape[1] > 1:
                op = "reduce-scatter" if "all-reduce-scatter" in computation else base_op
                entry = totals[op, _group_axes(groups, mesh)]
                entry[0] += repeats
                entry[1] += repeats * _bytes_sent(
                    op, program.operand_bytes(computation, instruction), groups.shape[1]
                )
        if fused:
            continue
        loops_without_trip_count += instruction.op == "while" and not program.trip_count(
            instruction
        )
        cycles_match = _CYCLES.search(instruction.attributes)
        cycles += repeats * int(cycles_match[1]) if cycles_match else 0
        total += repeats * program.memory_traffic(computation, instruction)
    collectives = (
        Collective(*key, int(repeats), bytes_sent) for key, (repeats, bytes_sent) in totals.items()
    )
    return Cost(
        total,
        cycles,
        tuple(sorted(collectives, key=lambda collective: -collective.sent)),
        loops_without_trip_count,
    )


class Program:
    """The computations of a program by name, and its entry."""

    def __init__(self, text: str) -> None:
        self.entry, self.computations = "", {}
        instructions: dict[str, Instruction] = {}
        for line in text.splitlines():
            head = _COMPUTATION.match(line)
            if head:
                instructions = self.computations.setdefault(head[2], {})
                self.entry = head[2] if head[1] else self.entry
            elif _INSTRUCTION.match(line):
                instruction = _parse_instruction(line)
                instructions[instruction.name] = instruction

    def walk(self) -> Iterator[tuple[str, Instruction, int, bool]]:
        """Yields (computation, instruction, how often it runs, whether it is in a fusion) for all
        instructions.
        """
        stack = [(self.entry, 1, False)]
        while stack:
            name, repeats, fused = stack.pop()
            for instruction in self.computations.get(name, {}).values():
                yield name, instruction, repeats, fused
                if instruction.op in _INDIRECT or instruction.op == "fusion":
                    inner_repeats = repeats * (self.trip_count(instruction) or 1)
                    stack += [
                        (called, inner_repeats, fused or instruction.op == "fusion")
                        for called in _called_computations(instruction.attributes)
                    ]

    def trip_count(self, instruction: Instruction) -> int:
        """Trip count of a loop; 0 if unknown. TPU programs give it only as the constant in the
        condition.
        """
        match = _TRIPS.search(instruction.attributes)
        if match or instruction.op != "while":
            return int(match[1]) if match else 0
        condition = re.search(r"condition=%?([\w.\-]+)", instruction.attributes)
        numbers = [
            int(inner.operands[0])
            for inner in self.computations.get(condition[1], {}).values()
            if inner.op == "constant" and inner.shape.startswith("s32[]")
        ]
        return numbers[0] if len(numbers) == 1 else 0

    def operand_bytes(self, computation: str, instruction: Instruction) -> float:
        """Bytes of all operands."""
        instructions = self.computations[computation]
        return sum(
            shape_bytes(instructions[name].shape)
            for name in instruction.operands
            if name in instructions
        )

    def memory_traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes of main memory that an instruction reads and writes; only the slice for slices."""
        if (
            instruction.op in _FREE
            or instruction.op.endswith("-done")
            or _NO_WORK.search(instruction.attributes)
        ):
            return 0.0
        instructions = self.computations[computation]
        operands = [
            instructions[name].shape for name in instruction.operands if name in instructions
        ]
        if instruction.op in _SLICES:
            return 2 * shape_bytes(instruction.shape, main_memory_only=True)
        if instruction.op == "dynamic-update-slice":
            return 2 * shape_bytes(operands[1], main_memory_only=True)
        if instruction.op.endswith("-start"):  # the result includes the operand
            result = next(
                (shape for shape in _array_shapes(instruction.shape) if shape not in operands), ""
            )
            bytes_read = (
                shape_bytes(result)
                if instruction.op == "slice-start" and _in_main(operands[0])
                else sum(shape_bytes(operand, main_memory_only=True) for operand in operands)
            )
            return bytes_read + shape_bytes(result, main_memory_only=True)
        if instruction.op == "fusion":
            return self._fusion_traffic(instruction, operands)
        return shape_bytes(instruction.shape, main_memory_only=True) + sum(
            shape_bytes(shape, main_memory_only=True) for shape in operands
        )

    def _fusion_traffic(self, instruction: Instruction, operands: list[str]) -> float:
        body = self.computations.get(
            next(iter(_called_computations(instruction.attributes)), ""), {}
        )
        users = defaultdict(list)
        for inner in body.values():
            for position, name in enumerate(inner.operands):
                users[name].append((inner, position))
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
                total += min(shape_bytes(shape), _operand_bytes_read(inner.name, users))
        root = next((inner for inner in body.values() if inner.root), instruction)
        producers = root.operands if root.op == "tuple" else (root.name,)
        for result, name in zip(_array_shapes(instruction.shape), producers, strict=False):
            total += _result_bytes_written(body, name, result) if _in_main(result) else 0.0
        return total


def shape_bytes(shape: str, main_memory_only: bool = False) -> float:
    """Bytes of a shape as text, tuples summed; `main_memory_only`: only arrays in main memory."""
    return sum(
        _bits(kind) / 8 * math.prod(int(dim.lstrip("<=")) for dim in dims.split(",") if dim)
        for kind, dims, layout in _ARRAY.findall(shape)
        if not main_memory_only or "S(" not in layout
    )


def _operand_bytes_read(name: str, users: Mapping[str, list[tuple[Instruction, int]]]) -> float:
    """Bytes that a fusion reads of an operand: only slices where it is sliced, none where it is
    overwritten.
    """
    total = 0.0
    for user, position in users[name]:
        if user.op in _SLICES and position == 0:
            total += shape_bytes(user.shape)
        elif user.op == "bitcast":
            total += _operand_bytes_read(user.name, users)
        elif not (user.op == "dynamic-update-slice" and position == 0):
            return math.inf
    return total


def _in_main(shape: str) -> bool:
    return "S(" not in shape


def _bits(kind: str) -> int:
    """Bits of an HLO element type; most type names state them, such as f32, s8 and f8e4m3fn."""
    return _BITS.get(kind) or (0 if kind in _BITS else int(re.sub(r"^[a-z]+(\d+).*", r"\1", kind)))


def _array_shapes(shape: str) -> list[str]:
    return [match[0] for match in _ARRAY.finditer(shape)]


def _result_bytes_written(body: Mapping[str, Instruction], name: str, shape: str) -> float:
    """Bytes that a fusion writes of a result: only the slice if updated in place."""
    producer = body.get(name)
    while producer is not None and producer.op in ("bitcast", "copy") and producer.operands:
        producer = body.get(producer.operands[0])
    if producer is not None and producer.op == "dynamic-update-slice":
        return shape_bytes(body[producer.operands[1]].shape)
    return shape_bytes(shape)


def _parse_instruction(line: str) -> Instruction:
    head = _INSTRUCTION.match(line)
    stop = (
        _find_closing(line, head.end()) if line[head.end()] == "(" else line.index(" ", head.end())
    )
    shape = re.sub(r"/\*.*?\*/", "", line[head.end() : stop])
    op, _, _ = line[stop:].strip().partition("(")
    start = line.index("(", stop)
    end = _find_closing(line, start)
    inner = line[start + 1 : end - 1]
    operands = (
        (inner,) if op in ("parameter", "constant") else tuple(re.findall(r"%([\w.\-]+)", inner))
    )
    return Instruction(head[2], shape, op, operands, line[end:], bool(head[1]))


def _find_closing(line: str, start: int) -> int:
    """The position after the bracket that closes the one at `start`."""
    depth = 0
    for position in range(start, len(line)):
        depth += (line[position] == "(") - (line[position] == ")")
        if not depth:
            return position + 1
    return len(line)


def _called_computations(attributes: str) -> Iterator[str]:
    for kind, names in re.findall(
        r"\b(calls|body|condition|to_apply|branch_computations|true_computation|false_computation)="
        r"(\{[^}]*\}|%?[\w.\-]+)",
        attributes,
    ):
        del kind
        yield from re.findall(r"[\w.\-]+", names)


def _device_groups(attributes: str, num_devices: int) -> np.ndarray:
    """Device groups that communicate, int [groups, members]; pairs for a permutation."""
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
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
    named_axes = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", attributes)
    if named_axes:  # axes of the program's mesh, in the same device order
        sizes = {
            axis: int(number) for axis, number in re.findall(r"'([^']+)'=(\d+)", named_axes[1])
        }
        group_axes = [axis for axis in sizes if f"'{axis}'" in named_axes[2]]
        order = [
            list(sizes).index(axis)
            for axis in (*(axis for axis in sizes if axis not in group_axes), *group_axes)
        ]
        members = math.prod(sizes[axis] for axis in group_axes)
        return (
            np.arange(math.prod(sizes.values()))
            .reshape(tuple(sizes.values()))
            .transpose(order)
            .reshape(-1, members)
        )
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if not listed:
        return np.arange(num_devices)[None]
    return np.array(
        [[int(n) for n in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    )


def _group_axes(groups: np.ndarray, mesh: Mapping[str, int]) -> tuple[str, ...]:
    """The mesh axes along which the members of a group differ."""
    positions = np.unravel_index(groups, tuple(mesh.values()))
    return tuple(
        axis
        for axis, position in zip(mesh, positions, strict=True)
        if (position != position[:, :1]).any()
    )


def _bytes_sent(op: str, bytes_held: float, num_members: int) -> float:
    """Bytes that each member sends with ring algorithms; bytes_held: bytes it holds."""
    if op == "all-gather":
        return bytes_held * (num_members - 1)
    if op in ("collective-permute", "collective-broadcast"):
        return bytes_held
    return bytes_held * (num_members - 1) / num_members * (2 if op == "all-reduce" else 1)
