"""What devices exchange in a compiled program, read from its text: each collective, its bytes and its mesh axes."""

import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
_WIDTHS = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4}
_WIDTHS |= {"f64": 8, "s64": 8, "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1}


@dataclass(frozen=True)
class Collective:
    kind: str
    axes: tuple[str, ...]
    """Mesh axes over which the devices of a group differ."""
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    """(type, shape) of each array that a device gets."""
    times: int
    """How often a step runs it: the product of the trip counts of the loops around it."""
    group_size: int

    @property
    def num_bytes(self) -> int:
        """Of the results on one device, all times together."""
        return self.times * sum(_WIDTHS[dtype] * math.prod(shape) for dtype, shape in self.shapes)

    @property
    def wire_bytes(self) -> float:
        """That a device sends over its links by the ring algorithms, all times together."""
        n = self.group_size
        factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        return self.num_bytes * factor.get(self.kind, (n - 1) / n)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Those of a compiled program (``compiled.as_text()``) whose partitions are the devices of ``mesh`` in order.

    Raises ValueError on a loop whose trip count the compiler does not know, or a group that is no set of mesh axes.
    """
    bodies = dict(_computations(text))
    names = _groups_by_axes(mesh)
    found: list[Collective] = []

    def visit(name: str, times: int) -> None:
        for line in bodies[name]:
            kind = _kind(line)
            if kind is not None:
                groups = _groups(line, mesh.size)
                if max(map(len, groups)) > 1:
                    shapes = _result_shapes(line)
                    found.append(Collective(kind, names(groups), shapes, times, max(map(len, groups))))
            called = re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)", line)
            if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
                called += re.findall(r"%?([\w.\-]+)", branches[1])
            turns = 1
            if " while(" in line:
                count = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', line)
                turns = int(count[1]) if count else _UNKNOWN
            for each in called:
                if each in bodies:
                    visit(each, times * turns)

    visit(_entry(text), 1)
    if any(collective.times >= _UNKNOWN for collective in found):
        raise ValueError("a collective is in a loop whose number of turns the compiler does not know")
    return found


_UNKNOWN = 2**60


def _computations(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        if (start := re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line)) and not line.startswith(" "):
            name, lines = start[1], []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _entry(text: str) -> str:
    match = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if match is None:
        raise ValueError("the program has no entry")
    return match[1]


def _kind(line: str) -> str | None:
    match = re.search(r"[\])}] (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?\(", line)
    return match[1] if match else None


def _result_shapes(line: str) -> tuple[tuple[str, tuple[int, ...]], ...]:
    result = re.split(r" (?:all|reduce|collective)-", line.split(" = ", 1)[1])[0]
    shapes = [
        (dtype, tuple(int(n) for n in dims.split(",") if n))
        for dtype, dims in re.findall(r"(\w+)\[([\d,]*)\]", result)
    ]
    if "-start(" in line and len(shapes) > 1 and "all-reduce" not in line:
        shapes = shapes[len(shapes) // 2 :]  # (operands, results)
    return tuple(shapes)


def _groups(line: str, num_devices: int) -> list[tuple[int, ...]]:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}?", line):
        return [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)", pairs[1])]
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\(([\d,]+)\))? \{(.*?)\}", line):
        return _groups_of_named_mesh(*named.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line):
        shape, dims = ([int(n) for n in part.split(",")] for part in iota.groups()[:2])
        ids = np.arange(math.prod(dims)).reshape(dims)
        if iota[3]:
            ids = ids.transpose([int(n) for n in iota[3].split(",")])
        return [tuple(row) for row in ids.reshape(shape).tolist()]
    listed = re.search(r"replica_groups=\{(.*?)\}(?:,|$| )", line)
    groups = re.findall(r"\{([\d,]+)\}", listed[1] + "}") if listed else []
    return [tuple(map(int, group.split(","))) for group in groups] or [tuple(range(num_devices))]


def _groups_of_named_mesh(mesh: str, order: str | None, chosen: str) -> list[tuple[int, ...]]:
    """As in mesh['a'=2,'b'=4] {'a','b':(1)2}: groups along axes, or along parts of axes (:(outer size)size)."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
    dims, along = [], []
    parts = {
        name: (int(outer), int(size)) if outer else (1, sizes[name])
        for name, outer, size in re.findall(r"'(\w+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, whole in sizes.items():
        outer, size = parts.get(name, (1, 1))
        along.append(len(dims) + 1)
        dims += [outer, size, whole // outer // size]
    ids = np.array([int(n) for n in order.split(",")]) if order else np.arange(math.prod(dims))
    moved = np.moveaxis(ids.reshape(dims), along, range(-len(along), 0))
    return [tuple(row) for row in moved.reshape(-1, math.prod(dims[axis] for axis in along)).tolist()]


def _groups_by_axes(mesh: Mesh) -> Callable[[list[tuple[int, ...]]], tuple[str, ...]]:
    axes = [name for name in mesh.axis_names if mesh.shape[name] > 1]
    ids = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
    known = {}
    for count in range(1, len(axes) + 1):
        for chosen in itertools.combinations(axes, count):
            last = [mesh.axis_names.index(name) for name in chosen]
            moved = np.moveaxis(ids, last, range(-count, 0)).reshape(-1, math.prod(mesh.shape[n] for n in chosen))
            known[frozenset(frozenset(row) for row in moved.tolist())] = chosen

    def of(groups: list[tuple[int, ...]]) -> tuple[str, ...]:
        wanted = frozenset(frozenset(group) for group in groups)
        if wanted in known:
            return known[wanted]
        # Pairs of a permutation, or groups that are parts of those of some axes.
        for larger, chosen in known.items():
            if all(any(group <= whole for whole in larger) for group in wanted):
                return chosen
        raise ValueError(f"the groups {groups} are of no mesh axes")

    return of
