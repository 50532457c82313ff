"""The map of the package and the path to read, with today's line counts: python -m tests.house

README.md has what this prints between two comments; --write puts it there.
"""

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "moe_jax"

# Each row: files or folders below moe_jax/, and what they hold.
CORE = [
    ("axes.py, errors.py", "the legend of axis letters; what is the user's mistake, and what is the machine's fault"),
    ("config/, cli.py", "every setting with its type, default, meaning and bounds; the command line made of them"),
    ("files.py", "files that are whole or absent, files that grow, locks, typed JSON"),
    ("sharding/", "the device mesh, the only place that names its axes; what crosses it; start-up of many processes"),
    ("model/", "layers, attention with its cache, decoder"),
    ("model/moe/", "the sparse layer: a router makes a plan, a backend carries it out, `layer.py` joins them"),
    ("data/", "what a step eats: tokenizers, the prepared folder, batches"),
    ("runs/", "what a run directory is: layout, checkpoints, metrics, log"),
    ("training/", "resolve, restore or init, fit: the step is pure, the loop is not; optimizers, evaluation, FLOPs"),
    ("sampling/", "logits processors, the decode loop, the engine that batches texts, `load`"),
]
EDGES = [
    ("prepare/", "text of any kind to a prepared folder: `python -m moe_jax.prepare`"),
    ("report/", "pictures of a run"),
    ("trackers/", "TensorBoard and MLflow; alarms of a run, profiles, the watchdog"),
    ("server/", "OpenAI's completions API: `python -m moe_jax.server`"),
    ("estimate/", "what a step needs of each device, before anything runs: `python -m moe_jax.estimate`"),
    ("terminal/", "what `sample.py` shows on a terminal"),
    ("commands/, evaluate.py", "what joins core and edges, one file a command"),
]
# In reading order: from the letters of an array's axes to a generated token.
PATH = [
    *("axes", "config/__init__", "model/moe/plan", "model/moe/routing", "model/moe/backends", "model/moe/dispatch"),
    *("model/moe/statistics", "model/moe/layer", "model/attention", "model/decoder"),
    *("training/step", "training/loop", "sampling/decode"),
]
BEGIN, END = "<!-- python -m tests.house --write -->\n", "<!-- end -->\n"


def lines_of(names: str) -> int:
    """Lines of Python in ``names``, files or folders below moe_jax/ divided by commas."""
    files = set()
    for name in names.split(", "):
        place = PACKAGE / name
        files |= {place} if place.suffix else set(place.rglob("*.py"))
        assert files, f"there is no {name}; edit tests/house.py"
    return sum(file.read_text().count("\n") for file in files)


def lines_of_rows(rows: list[tuple[str, str]]) -> dict[str, int]:
    """Lines of each row; those of a folder leave out a folder in it that has a row of its own."""
    counts = {names: lines_of(names) for names, _ in rows}
    inner = {name: [other for other in counts if other != name and other.startswith(name)] for name in counts}
    return {name: count - sum(counts[other] for other in inner[name]) for name, count in counts.items()}


def path() -> list[tuple[str, int]]:
    """The path to read: (file, lines)."""
    return [(name, lines_of(f"{name}.py")) for name in PATH]


def totals() -> dict[str, int]:
    """Lines of the core, the edges, the whole package and the path."""
    return {
        "core": sum(lines_of_rows(CORE).values()),
        "edges": sum(lines_of_rows(EDGES).values()),
        "package": sum(file.read_text().count("\n") for file in PACKAGE.rglob("*.py")),
        "path": sum(count for _, count in path()),
    }


def block() -> str:
    """The map and the path as Markdown."""
    total = totals()
    table = ["| `moe_jax/` | | lines |", "|---|---|---:|"]
    for title, about, rows in (
        ("core", "everything that decides a number", CORE),
        ("edges", "what people and files meet", EDGES),
    ):
        table.append(f"| **the {title}** | {about} | **{total[title]:,}** |")
        counts = lines_of_rows(rows)
        for names, what in rows:
            table.append(f"| {', '.join(f'`{name}`' for name in names.split(', '))} | {what} | {counts[names]:,} |")
    table.append(f"| **the package** | | **{total['package']:,}** |")
    places = [
        f"[{name.removesuffix('/__init__').split('/')[-1]}](moe_jax/{name}.py) ({count})" for name, count in path()
    ]
    text = f"A path to read, {total['path']:,} lines: {', '.join(places)}."
    return "\n".join([*table, "", textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)]) + "\n"


def main() -> None:
    if sys.argv[1:] != ["--write"]:
        print(block(), end="")
        return
    page = ROOT / "README.md"
    before, rest = page.read_text().split(BEGIN)
    page.write_text(before + BEGIN + block() + END + rest.split(END)[1])


if __name__ == "__main__":
    main()
