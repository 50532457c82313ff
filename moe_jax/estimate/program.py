"""A compiled program as a list of operations, each as often as it runs: read from the text that XLA prints of it."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

Shape = tuple[str, tuple[int, ...]]
"""(type, lengths)."""

_WIDTHS = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8, "f8e4m3fn": 1, "f8e5m2": 1}
_WIDTHS |= {f"{sign}{8 * width}": width for sign in "su" for width in (1, 2, 4, 8)}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "copy-done", "partition-id"}
_HOLDS = re.compile(r"async-|fusion .* async-collective-start|fusion .*calls=%?all-reduce-scatter")
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*)$")


@dataclass(frozen=True)
class Operation:
    kind: str
    """As XLA calls it: fusion, dot, custom-call, all-gather, ..."""
    results: tuple[Shape, ...]
    operands: tuple[Shape, ...]
    flops: float
    """Of the matrix products in it, once."""
    num_bytes: int
    """Of operands and results, once: what memory moves where nothing stays in a cache. Of an array of which it reads
    or writes a slice, the slice."""
    times: int
    """How often a run of the program makes it: the product of the turns of the loops around it."""
    line: str


def size_of(shapes: tuple[Shape, ...]) -> int:
    """Bytes of arrays of these types and lengths."""
    return sum(_WIDTHS.get(dtype, 0) * math.prod(lengths) for dtype, lengths in shapes)


def operations(text: str) -> Iterator[Operation]:
    """Those of ``compiled.as_text()``, loops unrolled; a loop whose turns the compiler does not know counts once."""
    bodies = {name: [match for line in lines if (match := _INSTRUCTION.match(line))] for name, lines in _parts(text)}
    entry = re.search(r"^ENTRY %?([\w.\-]+)", text, re.MULTILINE)
    if entry is None:
        raise ValueError("the program has no entry")
    yield from _walk(entry[1], bodies, 1)


def _parts(text: str) -> Iterator[tuple[str, list[str]]]:
    name, lines = None, []
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) (?:\(.*\) -> .*)?\{$", line):
            name, lines = start[1], []
        elif line.startswith("}") and name is not None:
            yield name, lines
            name = None
        elif name is not None:
            lines.append(line)


def _walk(name: str, bodies: dict[str, list[re.Match]], times: int) -> Iterator[Operation]:
    shapes = {match[1]: shapes_in(match[2]) for match in bodies[name]}
    for match in bodies[name]:
        name_here, result, kind, rest = match.groups()
        called = _called(rest, bodies)
        # A TPU's collectives lie in fusions: they begin in one, pass others and end in one; or they are followed by a
        # slice, and then less is sent than is counted here.
        if kind in ("while", "conditional", "call") or _HOLDS.match(f"{kind} {rest} {name_here}"):
            for each in called:
                yield from _walk(each, bodies, times * (_turns(rest, bodies) if kind == "while" else 1))
        elif kind not in _FREE and not kind.endswith("-done") and not name_here.startswith("async-collective-done"):
            operands = [shapes.get(each, ()) for each in _operand_names(rest)]
            flops = _product_flops(match, shapes) + sum(_flops_within(each, bodies) for each in called)
            inner = bodies[called[0]] if kind == "fusion" and called else None
            num_bytes = _moved(match, operands) if inner is None else _moved_by_fusion(shapes_in(result), inner)
            flat = tuple(shape for shapes in operands for shape in shapes)
            yield Operation(kind, shapes_in(result), flat, flops, num_bytes, times, match[0])


def _turns(rest: str, bodies: dict[str, list[re.Match]]) -> int:
    """As a loop's line has it; a TPU's has not: the number that its condition compares with, where that is but one."""
    if known := re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', rest):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", rest)
    ends = [each[4] for each in bodies[condition[1]] if each[3] == "constant"] if condition else []
    return int(ends[0].split(")")[0]) if len(ends) == 1 and ends[0][0].isdigit() else 1


def _moved(match: re.Match, operands: list[tuple[Shape, ...]]) -> int:
    """Bytes that an operation reads and writes: of a slice's source and an update's target only the part."""
    if match[3] in ("dynamic-slice", "slice", "gather"):
        return 2 * size_of(shapes_in(match[2]))
    if match[3] == "dynamic-update-slice":
        return 2 * size_of(operands[1])
    return size_of(shapes_in(match[2])) + sum(map(size_of, operands))


def _moved_by_fusion(results: tuple[Shape, ...], inner: list[re.Match]) -> int:
    """Bytes of a fusion's operands and results that the operations in it read and write."""
    shapes = {match[1]: shapes_in(match[2]) for match in inner}
    origin = {match[1]: match[1] for match in inner if match[3] == "parameter"}
    read = dict.fromkeys(origin, 0)
    written = size_of(results)
    for match in inner:
        names = _operand_names(match[4])
        if match[3] in ("bitcast", "copy") and names[0] in origin:  # the same array by another name
            origin[match[1]] = origin[names[0]]
            continue
        for place, name in enumerate(names):
            if name not in origin:
                continue
            whole = size_of(shapes[name])
            if match[3] in ("dynamic-slice", "slice", "gather") and place == 0:
                whole = size_of(shapes[match[1]])
            elif match[3] == "dynamic-update-slice" and place == 0:
                whole = 0
            read[origin[name]] += whole
        if match[3] == "dynamic-update-slice":
            written += size_of(shapes.get(names[1], ())) - size_of(shapes[match[1]])
    return max(written, 0) + sum(min(size_of(shapes[name]), total) for name, total in read.items())


def _called(rest: str, bodies: dict[str, list[re.Match]]) -> list[str]:
    found = re.findall(r"(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.\-]+)", rest)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", rest):
        found += re.findall(r"%?([\w.\-]+)", branches[1])
    return [name for name in found if name in bodies]


def _flops_within(name: str, bodies: dict[str, list[re.Match]]) -> float:
    shapes = {match[1]: shapes_in(match[2]) for match in bodies[name]}
    return sum(
        _product_flops(match, shapes) + sum(_flops_within(each, bodies) for each in _called(match[4], bodies))
        for match in bodies[name]
    )


def _product_flops(match: re.Match, shapes: dict[str, tuple[Shape, ...]]) -> float:
    """2 · results · contracted lengths, of a dot and of what cuBLAS makes of one; of a TPU's convolution too."""
    _, result, kind, rest = match.groups()
    names = _operand_names(rest)
    left = shapes.get(names[0], ()) if names else ()
    if not left or not (kind in ("dot", "convolution") or "__cublas$" in rest):
        return 0.0
    num_results = math.prod(shapes_in(result)[0][1])
    if kind == "convolution":  # as TPUs write a product: [.., b f] x [.., i o]; f is contracted
        labels = re.search(r"dim_labels=(\w+)_", rest)
        return 2.0 * num_results * left[0][1][labels[1].index("f")] if labels else 0.0
    contracted = re.search(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]"?([\d",]*)', rest)
    axes = [int(axis) for axis in re.findall(r"\d+", contracted[1])] if contracted else []
    return 2.0 * num_results * math.prod(left[0][1][axis] for axis in axes)


def _operand_names(rest: str) -> list[str]:
    depth, end = 0, 0
    for end, character in enumerate(rest):  # noqa: B007 - the end of the operands is what is looked for
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            break
    return re.findall(r"%([\w.\-]+)", rest[:end])


def shapes_in(text: str) -> tuple[Shape, ...]:
    """The arrays of a type as XLA writes it: f32[2,3]{1,0}, or a tuple of such."""
    found = re.findall(r"(\w+)\[([\d,]*)\]", text)
    return tuple((dtype, tuple(int(n) for n in lengths.split(",") if n)) for dtype, lengths in found)
