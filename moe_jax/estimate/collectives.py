"""What devices exchange in a compiled program, read from its text: each collective, its bytes and its mesh axes."""

import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jax.sharding import Mesh

from moe_jax.estimate.program import Operation, Shape, operations, size_of

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    kind: str
    axes: tuple[str, ...]
    """Mesh axes over which the devices of a group differ."""
    shapes: tuple[Shape, ...]
    """Of each array that a device gets."""
    times: int
    """How often a step makes it."""
    group_size: int

    @property
    def num_bytes(self) -> int:
        """Of the results on one device, all times together."""
        return self.times * size_of(self.shapes)

    @property
    def wire_bytes(self) -> float:
        """What a device sends over its links by the ring algorithms, all times together."""
        n = self.group_size
        factor = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1.0, "collective-permute": 1.0}
        return self.num_bytes * factor.get(self.kind, (n - 1) / n)


def collectives(text: str, mesh: Mesh) -> list[Collective]:
    """Those of a compiled program (``compiled.as_text()``) whose partitions are the devices of ``mesh`` in order."""
    axes_of = _groups_by_axes(mesh)
    found = []
    for operation in operations(text):
        kind = operation.kind.removesuffix("-start")
        if kind not in KINDS:
            continue
        groups = _groups(operation.line, mesh.size)
        size = max(map(len, groups))
        if size > 1:
            found.append(Collective(kind, axes_of(groups), _received(operation), operation.times, size))
    return found


def _received(operation: Operation) -> tuple[Shape, ...]:
    if operation.kind.endswith("-start") and operation.kind != "all-reduce-start":  # (operands, results, ...)
        return operation.results[len(operation.operands) : 2 * len(operation.operands)]
    return operation.results


def _groups(line: str, num_devices: int) -> list[tuple[int, ...]]:
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}?", line):
        return [tuple(map(int, pair.split(","))) for pair in re.findall(r"\{?(\d+,\d+)", pairs[1])]
    if named := re.search(r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?\)?)\))? \{(.*?)\}", line):
        return _groups_of_named_mesh(*named.groups())
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", line):
        rows = _ids(iota[2]).reshape([int(n) for n in iota[1].split(",")])
        return [tuple(row) for row in rows.tolist()]
    listed = re.search(r"replica_groups=\{(.*?)\}(?:,|$| )", line)
    groups = re.findall(r"\{([\d,]+)\}", listed[1] + "}") if listed else []
    return [tuple(map(int, group.split(","))) for group in groups] or [tuple(range(num_devices))]


def _ids(text: str) -> np.ndarray:
    """Of devices, as in 0,2,1,3 or [2,4]T(1,0): those from 0 on, in this shape, with its axes in another order."""
    shape, _, order = text.strip("[)").partition("]")
    numbers = [int(n) for n in shape.split(",")]
    if not text.startswith("["):
        return np.array(numbers)
    ids = np.arange(math.prod(numbers)).reshape(numbers)
    return (ids.transpose([int(n) for n in order[2:].split(",")]) if order else ids).reshape(-1)


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
    ids = _ids(order) if order else np.arange(math.prod(dims))
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
        # The pairs of a permutation lie within the groups of some axes; those of all axes hold any.
        within = (chosen for larger, chosen in known.items() if all(any(g <= w for w in larger) for g in wanted))
        return next(within)

    return of
