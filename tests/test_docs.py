"""The documentation builds offline and without warnings, and names everything that is public."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

import hooked_llava.errors
from benchmarks.readme import ROOT, blocks, pages

DOCS = ROOT / "docs"
NEEDED = ("sphinx", "furo", "myst_nb", "latex2mathml")
MISSING = [name for name in NEEDED if find_spec(name) is None]
needs_sphinx = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)}; pip install -e '.[docs]'"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("docs")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-d", str(out / "doctrees")]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(DOCS), str(out / "html")], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return out / "html"


@needs_sphinx
@pytest.mark.slow
def test_every_page_is_built(built: Path) -> None:
    sources = [path.relative_to(DOCS) for path in DOCS.rglob("*.md")]
    assert all((built / path.with_suffix(".html")).is_file() for path in sources)


@needs_sphinx
@pytest.mark.slow
def test_a_page_asks_no_server_for_anything(built: Path) -> None:
    loads = re.compile(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//|<link[^>]*href=\"(?:https?:)?//")
    assert [path.name for path in built.rglob("*.html") if loads.search(path.read_text(encoding="utf-8"))] == []


def test_every_error_class_has_a_page() -> None:
    classes = [
        name
        for name, kind in vars(hooked_llava.errors).items()
        if inspect.isclass(kind)
        and issubclass(kind, (Exception, Warning))
        and kind.__module__ == hooked_llava.errors.__name__
    ]
    assert sorted(path.stem for path in (DOCS / "errors").glob("*.md") if path.stem != "index") == sorted(classes)


PUBLIC = (
    "",
    ".analysis",
    ".experiments",
    ".editing",
    ".steering",
    ".sae",
    ".features",
    ".datasets",
    ".results",
    ".toy",
    ".viz",
    ".readout.metrics",
)


@pytest.mark.parametrize("room", PUBLIC)
def test_every_public_name_has_an_executed_example(room: str) -> None:
    """In its docstring, in one of a class's methods, or on a page."""
    module = import_module(f"hooked_llava{room}")
    shown = "\n".join(block for page in pages() for block in blocks(page.read_text(encoding="utf-8")))
    without = []
    for name in module.__all__:
        value = getattr(module, name)
        own = vars(value).values() if inspect.isclass(value) else ()
        docs = [inspect.getdoc(part) or "" for part in (value, *own)]
        if callable(value) and not any(">>>" in doc for doc in docs) and not re.search(rf"\b{name}\b", shown):
            without.append(name)
    assert without == []


def test_the_citation_names_this_version() -> None:
    assert f"version: {hooked_llava.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
