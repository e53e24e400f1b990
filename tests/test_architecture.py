"""The house keeps its shape: imports go one way, files and functions stay short, nothing is unpickled."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import hooked_llava

ROOT = Path(hooked_llava.__file__).parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# Floors of the house, the ground first. A module may import from floors below its own and from its own floor. Names
# stand for the module or the whole package of that name.
FLOORS = (
    ("errors", "config", "files", "hook_names"),
    ("architecture",),
    ("geometry", "positions", "pictures", "token_text", "token_table", "spans", "token_map", "templates"),
    ("input_batch", "input_checks", "inputs"),
    ("loading", "components", "weights_id"),
    ("vision", "projector", "language"),
    ("caching", "cache", "prompt_hooks", "hooked_module", "protocol", "generation", "model", "verify"),
    (
        "interventions",
        "map_quality",
        "messages",
        "metric_names",
        "provenance",
        "answer_tokens",
        "answers",
        "metrics",
        "readout",
        "results",
        "saliency",
    ),
    ("datasets",),
    ("analysis",),
    ("editing", "sae"),
    ("viz",),
    ("cli",),
)
FLOOR = {name: number for number, floor in enumerate(FLOORS) for name in floor}
APART = ("toy",)  # uses what lies below datasets, and datasets; only the command line uses it
MAY_USE_TOY = ("cli", "toy")
# Analyses are one file per question; none imports another.
INDEPENDENT = ("analysis",)
COSTLY = (
    "matplotlib",
    "xarray",
    "typer",
    "pandas.plotting",
    "jinja2.environment",
    "hooked_llava.cli",
    "hooked_llava.toy",
)


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def part_of(dotted_name: str) -> str:
    """The floor's name for a module below hooked_llava: `components` for `components.norm`."""
    return dotted_name.split(".", maxsplit=1)[0]


def imports(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """Modules of hooked_llava that a file imports, anywhere in it, without the package's own name."""
    tree = parse(path)
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    skipped = set() if for_types else {node for guard in guards for node in ast.walk(guard)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [_imported(node.module or "", alias.name) for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("hooked_llava.") for name in names if name.startswith("hooked_llava."))


def _imported(package: str, name: str) -> str:
    """The module that `from package import name` reads: that of the name, if it is one."""
    inside = ROOT.parent / package.replace(".", "/") / name
    is_module = package == "hooked_llava" or inside.is_dir() or inside.with_suffix(".py").is_file()
    return f"{package}.{name}" if is_module else package


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def each_module(test):
    return pytest.mark.parametrize("path", modules(), ids=dotted)(test)


@each_module
def test_imports_go_one_way(path):
    here = part_of(dotted(path))
    if here in ("__init__", "__main__"):
        return
    if here in APART:
        upwards = [name for name in imports(path) if FLOOR.get(part_of(name), 0) > FLOOR["datasets"]]
    else:
        assert here in FLOOR, f"{here} has no floor yet: give it one in FLOORS"
        upwards = [name for name in imports(path) if FLOOR.get(part_of(name), 0) > FLOOR[here]]
    assert not upwards, f"{dotted(path)} imports upwards: {upwards}"


@each_module
def test_only_the_command_line_uses_toy(path):
    if part_of(dotted(path)) not in MAY_USE_TOY:
        assert not [name for name in imports(path) if part_of(name) in APART]


@each_module
def test_independent_files_do_not_import_each_other(path):
    package = part_of(dotted(path))
    if package in INDEPENDENT and path.name != "__init__.py":
        assert not [name for name in imports(path) if part_of(name) == package]


def test_no_circle_within_a_floor():
    """Modules of one floor may use each other, but not in a circle."""
    paths = {dotted(path).removesuffix(".__init__"): path for path in modules() if path != ROOT / "__init__.py"}
    uses = {name: set(imports(path, for_types=False)) for name, path in paths.items()}
    left = dict(uses)
    while left:  # take away whatever uses nothing of the rest, or is used by nothing of the rest
        used = {name for module in left for name in uses[module] & set(left) if name != module}
        free = [name for name in left if name not in used or not (uses[name] & set(left)) - {name}]
        assert free, f"imports go in a circle among {sorted(left)}"
        for name in free:
            del left[name]


@each_module
def test_files_and_functions_are_short(path):
    assert len(path.read_text().splitlines()) <= MAX_FILE_LINES
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            assert length <= MAX_FUNCTION_LINES, f"{node.name} has {length} lines"


@each_module
def test_nothing_is_unpickled(path):
    tree = parse(path)
    loaded = {
        alias.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names
    }
    loaded |= {(node.module or "").split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not loaded & {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "load"), ("torch", "save"), ("np", "load")}
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


def test_tests_mirror_the_package():
    """Every test file stands where the module it tests stands."""
    tests = Path(__file__).parent
    for test in tests.rglob("test_*.py"):
        mirrored = ROOT / test.relative_to(tests).with_name(test.name.removeprefix("test_"))
        assert mirrored.exists() or mirrored.with_suffix("").is_dir() or test.stem in NOT_MIRRORED, test


NOT_MIRRORED = (
    "test_architecture",
    "test_parity",
    "test_readme",
    "test_notebooks",
    "test_benchmarks",
    "test_baseline",
    "test_files_of_0_1",
    "test_promises",
    "test_transformer_lens_tools",
    "test_dtypes",
    "test_golden",
    "test_spellings",
    "test_known_mechanism",
    "test_known_mechanism_papers",
    "test_layer_norm",
)


def test_importing_the_package_stays_cheap():
    code = f"import sys, hooked_llava; print(*[name for name in {COSTLY!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.split() == []
