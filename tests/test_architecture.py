"""The house: which room imports which, what must not be imported or named where, and no setting without a reader.

What one file alone decides (relative imports, pickle, eval, swallowed errors) is linted by ruff: see pyproject.toml.
"""

import ast
import dataclasses
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest

from moe_jax.config import Config
from moe_jax.sharding.mesh import LOGICAL_RULES

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*ROOT.glob("*.py"), *(ROOT / "moe_jax").rglob("*.py")])
WITHOUT_JAX = [
    *("errors", "cli", "config", "files", "commands/train", "commands/sample"),
    *("data/dataset", "data/rows", "data/tokenizer_file", "prepare/cache", "prepare/folder"),
    *("runs/layout", "runs/opened", "runs/progress"),
    *("commands/server", "server/counters", "server/requests", "terminal/prompts"),
]


def test_rooms_import_as_the_contracts_in_pyproject_allow():
    """In a process of its own: import-linter takes pytest's stderr down with it."""
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache", "--no-logo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def import_without(modules: list[str], *heavy: str) -> None:
    """Imports ``modules`` in turn in a new process, and fails at the first that brings one of ``heavy`` in."""
    program = f"""
import importlib, sys
for module in {modules}:
    importlib.import_module("moe_jax." + module.replace("/", "."))
    found = set({heavy}) & set(sys.modules)
    assert not found, (module, found)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_command_waits_for_what_it_does_not_need():
    """A mistake in a setting is reported in half a second: no jax. Sampling reads no training data: no grain."""
    import_without(WITHOUT_JAX, "jax", "grain")
    import_without(["terminal/sampling", "sampling/api"], "grain")
    with pytest.raises(AssertionError, match=r"model/layers.*jax"):
        import_without(["files", "model/layers"], "jax")


def names_of_axes(source: str, names: set[str]) -> list[str]:
    """The mesh axes that ``source`` puts into a PartitionSpec, P or a mesh."""
    makers = ("PartitionSpec", "P", "make_mesh", "Mesh", "psum", "pmean", "all_gather", "axis_index")
    return [
        node.value
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] in makers
        for argument in call.args
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and node.value in names
    ]


def test_only_the_sharding_room_names_mesh_axes():
    axes = {axis for rule in LOGICAL_RULES.values() for axis in rule}
    for file in SOURCES:
        if "sharding" not in file.relative_to(ROOT).parts:
            assert names_of_axes(file.read_text(), axes) == [], file
    assert names_of_axes("jax.sharding.PartitionSpec(None, 'data')", axes) == ["data"]


def fields_of(section: type) -> Iterator[tuple[str, str]]:
    """(class, field) of each setting of ``section`` and of the sections in it."""
    for name, hint in typing.get_type_hints(section).items():
        if dataclasses.is_dataclass(hint):
            assert isinstance(hint, type)
            yield from fields_of(hint)
        else:
            yield section.__name__, name


SECTIONS = {"Config", *(section for section, _ in fields_of(Config))}
SECTION_OF = {"model": "ModelConfig", "moe": "MoEConfig"} | {
    name: hint.__name__ for name, hint in typing.get_type_hints(Config).items()
}


def settings_read(source: str) -> set[tuple[str, str]]:
    """(class, field) of the settings that ``source`` reads.

    An expression is a section if its last name is that of a section, as in config.train.seed, or if that name is
    annotated with a section's class in the same file, as in (config: ModelConfig).
    """
    tree = ast.parse(source)
    annotated = [
        (node.arg if isinstance(node, ast.arg) else ast.unparse(node.target), ast.unparse(node.annotation))
        for node in ast.walk(tree)
        if isinstance(node, ast.arg | ast.AnnAssign) and node.annotation is not None
    ]
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            owner = ast.unparse(node.value).split(".")[-1]
            found |= {(kind, node.attr) for name, kind in annotated if name == owner and kind in SECTIONS}
            if owner in SECTION_OF:
                found.add((SECTION_OF[owner], node.attr))
    return found


def test_every_setting_is_read_outside_of_the_configuration():
    outside = [file for file in SOURCES if file.stem != "cli" and "config" not in file.relative_to(ROOT).parts]
    read = set().union(*(settings_read(file.read_text()) for file in outside))
    assert [f"{section}.{name}" for section, name in fields_of(Config) if (section, name) not in read] == []
    example = "def f(config: MoEConfig, k: int):\n    self.train.seed, config.top_k, data.path\n    run.seed, x.router"
    assert settings_read(example) == {("TrainConfig", "seed"), ("MoEConfig", "top_k"), ("DataConfig", "path")}


# What no rule of ruff knows: arguments that let a reader execute a file, and Python's own compiler.
EXECUTES = re.compile(r"allow_pickle|trust_remote_code|fromregex|(?<![\w.])compile\(")


def too_long(source: str) -> list[str]:
    """What wants to be two: files over 320 lines and functions over 70. (ruff counts statements, not lines.)"""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > 70]
    return found + (["the file"] if source.count("\n") > 320 else [])


def test_files_execute_nothing_that_they_read_and_stay_short():
    for file in SOURCES:
        assert (EXECUTES.findall(file.read_text()), too_long(file.read_text())) == ([], []), file
    assert EXECUTES.findall("np.load(f, allow_pickle=True); compile(x); re.compile(y)") == ["allow_pickle", "compile("]
    assert too_long("def f():\n" + "    x = 1\n" * 70) == ["f"]
