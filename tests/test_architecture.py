"""The house keeps its shape: imports go one way, files and functions stay short, nothing is unpickled."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest

import hooked_llava

ROOT = Path(hooked_llava.__file__).parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# The rooms in the order in which data goes through them. A module imports from rooms before its own, and from its own.
ROOMS = (
    "errors",
    "checks",
    "storage",
    "machine",
    "options",
    "architecture",
    "prompt",
    "loading",
    "model",
    "readout",
    "results",
    "replay",
    "experiments",
    "datasets",
    "analysis",
    "editing",
    "steering",
    "sae",
    "features",
    "viz",
    "cli",
)
ORDER = {room: number for number, room in enumerate(ROOMS)}
APART = ("toy",)  # uses datasets and what lies before it; only the command line uses it
MAY_USE_TOY = ("cli", "toy")
MAX_TOP_LEVEL_MODULES = 5
# Analyses are one file per question; none imports another.
INDEPENDENT = ("analysis",)
# What an import may not bring, by what is imported. torch._dynamo and transformers.modeling_utils each take longer than
# torch; a model imports them when it is built. Modules are counted, not seconds: a busy machine changes those.
COSTLY = {
    "hooked_llava": ("torch", "transformers", "matplotlib", "xarray", "typer", "pandas", "jinja2", "hooked_llava.toy"),
    "hooked_llava.cli": ("torch", "transformers", "matplotlib", "xarray", "hooked_llava.viz", "hooked_llava.analysis"),
    "hooked_llava.model": (
        *("torch._dynamo", "torch.distributed.tensor", "transformers.modeling_utils", "transformers.processing_utils"),
        *("scipy", "sympy", "xarray", "matplotlib", "typer", "hooked_llava.toy"),
    ),
    "hooked_llava.editing, hooked_llava.analysis": ("torch._dynamo", "transformers.modeling_utils", "matplotlib"),
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def room_of(dotted_name: str) -> str:
    """The room of a module below hooked_llava: `model` for `model.components.norm`."""
    return dotted_name.split(".", maxsplit=1)[0]


def imports(path: Path) -> Iterator[str]:
    """Modules of hooked_llava that a file imports, anywhere in it and for types too, without the package's own name."""
    for node in ast.walk(parse(path)):
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
def test_imports_go_down(path):
    here = room_of(dotted(path))
    if here in ("__init__", "__main__"):
        return
    highest = ORDER["datasets" if here in APART else here]
    upwards = [name for name in imports(path) if room_of(name) in ORDER and ORDER[room_of(name)] > highest]
    assert not upwards, f"{dotted(path)} imports upwards: {upwards}"


@each_module
def test_only_the_command_line_uses_toy(path):
    if room_of(dotted(path)) not in MAY_USE_TOY:
        assert not [name for name in imports(path) if room_of(name) in APART]


@each_module
def test_rooms_import_the_module_that_defines_a_name(path):
    """Not a package that passes it on: its `__init__` would bring everything else along."""
    if path.name in ("__init__.py", "__main__.py") or room_of(dotted(path)) in ("cli", "__main__"):
        return
    passed_on = [name for name in imports(path) if (ROOT / name.replace(".", "/") / "__init__.py").exists()]
    assert not passed_on, f"{dotted(path)} imports from the packages {passed_on}; import from their modules"


def test_few_modules_stand_outside_a_room():
    outside = [path.name for path in ROOT.glob("*.py")]
    assert len(outside) <= MAX_TOP_LEVEL_MODULES, outside


def test_every_room_says_what_it_is_for():
    for package in (path.parent for path in modules() if path.name == "__init__.py" and path.parent != ROOT):
        if "checkpoint" not in package.parts:
            assert len((ast.get_docstring(parse(package / "__init__.py")) or "").split()) >= 5, package


@each_module
def test_independent_files_do_not_import_each_other(path):
    package = room_of(dotted(path))
    if package in INDEPENDENT and path.name != "__init__.py" and path.parent.name == package:
        assert not [name for name in imports(path) if room_of(name) == package and not name.startswith("analysis.maps")]


def test_no_module_imports_in_a_circle():
    """Imports for types count: two modules that name each other are one."""
    paths = {dotted(path).removesuffix(".__init__"): path for path in modules() if path != ROOT / "__init__.py"}
    uses = {name: set(imports(path)) - {name} for name, path in paths.items()}
    left = dict(uses)
    while left:  # take away whatever uses nothing of the rest, or is used by nothing of the rest
        used = {name for module in left for name in uses[module] & set(left)}
        free = [name for name in left if name not in used or not uses[name] & set(left)]
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
def test_fields_are_explained_in_the_docstring_of_their_class(path):
    """Under `Attributes:`, where help() shows them; it does not show a string below a field."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.ClassDef) and any("dataclass" in ast.unparse(d) for d in node.decorator_list):
            below = [b for a, b in pairwise(node.body) if isinstance(a, ast.AnnAssign) and isinstance(b, ast.Expr)]
            assert not below, f"{node.name}, line {below[0].lineno}: write it under Attributes: in the class docstring"


@pytest.mark.parametrize("room", [room for room in (*ROOMS, *APART) if (ROOT / room / "__init__.py").exists()])
def test_help_explains_every_field(room: str):
    package = import_module(f"hooked_llava.{room}")
    for name in getattr(package, "__all__", ()):
        public = getattr(package, name)
        if is_dataclass(public):
            explained = set(re.findall(r"^ +(\w+) \(", public.__doc__ or "", re.MULTILINE))
            own = {field.name for field in fields(public)} & set(public.__annotations__)
            assert own <= explained, f"{name}: {own - explained}"


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


def test_oracles_use_nothing_of_what_they_check():
    for oracle in (Path(__file__).parent / "oracles").glob("*.py"):
        assert not re.findall(r"^\s*(?:from|import) hooked_llava", oracle.read_text(encoding="utf-8"), re.M), (
            oracle.name
        )


NOT_MIRRORED = (
    "test_architecture",
    "test_tiles",
    "test_tile_geometry",
    "test_parity",
    "test_readme",
    "test_shape_checks",
    "test_docs",
    "test_notebooks",
    "test_bad_input",
    "test_benchmarks",
    "test_baseline",
    "test_changelog",
    "test_compiled",
    "test_costs",
    "test_dist",
    "test_forecasts",
    "test_patch_world",
    "test_dtypes",
    "test_several_devices",
    "test_little_memory",
    "test_files_of_0_1",
    "test_layer_norm",
    "test_spellings",
    "test_promises",
    "test_transformer_lens_tools",
    "test_transformer_lens_count",
    "test_golden",
    "test_known_mechanism",
    "test_known_mechanism_papers",
    "test_known_mechanism_tables",
    "test_family",
    "test_family_analyses",
    "test_layer_norm",
)


@pytest.mark.parametrize("imported", COSTLY)
def test_imports_stay_cheap(imported: str):
    code = f"import sys, {imported}; print(*[name for name in {COSTLY[imported]!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT.parent)
    assert done.stdout.split() == []
