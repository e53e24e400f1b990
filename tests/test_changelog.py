"""The changelog's tables of imports lead from what is gone to what is there."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

import hooked_llava

CHANGELOG = (Path(__file__).parents[1] / "CHANGELOG.md").read_text(encoding="utf-8")
MOVED = re.findall(r"^\| `([\w.]+)` \| `([\w.]+)` \|$", CHANGELOG, re.MULTILINE)
_ROWS = re.findall(r"^\| (`from .*?) \| (.*?) \|$", CHANGELOG, re.MULTILINE)
_IMPORT = re.compile(r"from [\w.]+ import \w+(?:, \w+)*")
OLD_IMPORTS = [statement for old, _ in _ROWS for statement in _IMPORT.findall(old)]
NEW_IMPORTS = sorted({statement for _, new in _ROWS for statement in _IMPORT.findall(new)})


def test_modules_that_moved() -> None:
    assert len(MOVED) > 80
    root = Path(hooked_llava.__file__).parent
    for old, new in MOVED:
        assert find_spec(f"hooked_llava.{new}"), new
        assert not root.joinpath(*old.split(".")).with_suffix(".py").exists(), old


@pytest.mark.parametrize("statement", NEW_IMPORTS)
def test_new_imports(statement: str) -> None:
    exec(statement, {})


@pytest.mark.parametrize("statement", OLD_IMPORTS)
def test_old_imports_are_gone(statement: str) -> None:
    with pytest.raises(ImportError):
        exec(statement, {})


def test_the_version_has_its_entry() -> None:
    assert f"\n## {hooked_llava.__version__}\n" in CHANGELOG
