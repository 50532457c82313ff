"""The house: which room imports which, what must not be imported or named where, and no setting without a reader."""

import ast
import dataclasses
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

# From left to right: a room of the core may import itself and any room of a later row, nothing else.
CORE = (
    ("training", "sampling"),
    ("runs",),
    ("data",),
    ("model",),
    ("sharding",),
    ("cli",),
    ("config",),
    ("files",),
    ("errors", "axes"),
)
# What the core never imports.
EDGES = (
    ("train", "sample", "evaluate"),
    ("commands",),
    ("terminal", "server", "prepare", "report", "trackers"),
)
ROWS = EDGES + CORE
WITHOUT_JAX = (
    "errors",
    "cli",
    "config",
    "files",
    "commands/train",
    "commands/sample",
    "data/byte_pairs",
    "data/hugging_face",
    "data/rows",
    "prepare/cache",
    "prepare/folder",
    "runs/layout",
    "runs/log",
    "runs/metrics_file",
    "runs/opened",
    "runs/progress",
    "server/arguments",
    "server/metrics",
    "server/requests",
    "terminal/prompts",
)


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None where it is not ours."""
    parts = module.split(".")
    if parts[0] == "moe_jax":
        return parts[1] if len(parts) > 1 else None
    return parts[0] if parts[0] in ("train", "sample") else None


def imports(source: str) -> Iterator[str]:
    """Every module that ``source`` imports, anywhere in it; `from a import b` as a and a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which room is meant"
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def backward_imports(room: str, source: str) -> list[str]:
    row_of = {name: index for index, names in enumerate(ROWS) for name in names}
    found = []
    for module in imports(source):
        other = room_of(module)
        if other is not None and other != room and row_of.get(other, -1) <= row_of[room]:
            found.append(module)
    return found


def module_name(file: Path) -> str:
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


MOVING = ("data.shards", "sampling.api", "training.evaluate", "training.loop", "training.train")


@pytest.mark.parametrize("file", [file for file in SOURCES if not module_name(file).endswith(MOVING)], ids=module_name)
def test_imports_go_to_the_right(file):
    room = room_of(module_name(file).removesuffix(".__init__"))
    if room is not None:
        assert backward_imports(room, file.read_text()) == []


def test_the_check_of_directions_finds_a_backward_import():
    assert backward_imports("model", "from moe_jax.config import Config") == []
    assert backward_imports("model", "def f():\n    from moe_jax.training import step") == [
        "moe_jax.training",
        "moe_jax.training.step",
    ]
    assert backward_imports("data", "import moe_jax.training.step") == ["moe_jax.training.step"]
    assert backward_imports("data", "from moe_jax import unheard_of") == ["moe_jax.unheard_of"]


def test_router_dispatcher_and_experts_do_not_know_each_other():
    parts = ("routing", "dispatch", "experts")
    for part in parts:
        found = set(imports((ROOT / f"moe_jax/model/moe/{part}.py").read_text()))
        for other in set(parts) - {part}:
            assert f"moe_jax.model.moe.{other}" not in found


def names_of_axes(source: str, names: set[str]) -> list[str]:
    """The mesh axes that ``source`` puts into a PartitionSpec, P or a mesh."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    makers = ("PartitionSpec", "P", "make_mesh", "Mesh", "psum", "pmean", "all_gather", "axis_index")
    return [
        node.value
        for call in calls
        if ast.unparse(call.func).split(".")[-1] in makers
        for argument in call.args
        for node in ast.walk(argument)
        if isinstance(node, ast.Constant) and node.value in names
    ]


def test_only_the_sharding_room_names_mesh_axes():
    axes = {axis for _, axis in LOGICAL_RULES if axis is not None}
    assert axes
    for file in SOURCES:
        if "sharding" not in file.parts:
            assert names_of_axes(file.read_text(), axes) == [], file
    assert names_of_axes("jax.sharding.PartitionSpec(None, 'data')", axes) == ["data"]


@pytest.mark.parametrize("part", WITHOUT_JAX)
def test_what_runs_before_jax_does_not_import_it(part):
    program = (
        f"import sys, moe_jax.{part.replace('/', '.')}; assert 'jax' not in sys.modules and 'grain' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


def test_sampling_does_not_wait_for_the_loader_of_training_data():
    program = "import sys, moe_jax.terminal.sampling, moe_jax.sampling.api; assert 'grain' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


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
    outside = [file for file in SOURCES if file.stem != "cli" and "config" not in file.parts]
    read = set().union(*(settings_read(file.read_text()) for file in outside))
    assert [f"{section}.{name}" for section, name in fields_of(Config) if (section, name) not in read] == []
    example = (
        "def f(config: MoEConfig, top_k: int):\n    self.train.seed, config.top_k, data.path\n    run.seed, x.router"
    )
    assert settings_read(example) == {("TrainConfig", "seed"), ("MoEConfig", "top_k"), ("DataConfig", "path")}


def what_runs_data(source: str) -> list[str]:
    """Modules and calls that execute what they read, or could be made to."""
    unsafe = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle", "torch"}
    found = [module for module in imports(source) if module.split(".")[0] in unsafe]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            found += [name] if name in ("eval", "exec", "compile", "yaml.load", "np.fromregex") else []
            found += [keyword.arg for keyword in node.keywords if keyword.arg in ("allow_pickle", "trust_remote_code")]
    return found


def test_nothing_that_is_read_is_ever_executed():
    """No pickle anywhere: what is in a run directory or a prepared folder is numbers and text."""
    assert [(file, what_runs_data(file.read_text())) for file in SOURCES if what_runs_data(file.read_text())] == []
    assert what_runs_data("import pickle\nnp.load(f, allow_pickle=True)\neval(x)") == [
        *("pickle", "allow_pickle", "eval"),
    ]


def swallowed(source: str) -> list[int]:
    """Lines of handlers that catch everything, or do nothing about what they catch."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or all(isinstance(step, ast.Pass) for step in node.body))
    ]


def test_no_error_is_swallowed():
    assert [(file, swallowed(file.read_text())) for file in SOURCES if swallowed(file.read_text())] == []
    assert swallowed("try:\n    f()\nexcept ValueError:\n    pass") == [3]


def too_long(source: str) -> list[str]:
    """What wants to be two: files over 320 lines and functions over 70."""
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    found = [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > 70]
    return found + (["the file"] if source.count("\n") > 320 else [])


def test_files_and_functions_stay_short():
    assert [(file, too_long(file.read_text())) for file in SOURCES if too_long(file.read_text())] == []
    assert too_long("def f():\n" + "    x = 1\n" * 70) == ["f"]
