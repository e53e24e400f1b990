"""Every notebook runs from top to bottom, offline, in the interpreter that runs the tests."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MODEL = os.environ.get("HOOKED_LLAVA_NOTEBOOK_MODEL", "tiny-shapes")
"""Another model to run them on: its name takes the place of "tiny-shapes" in the code."""
TIMEOUT = 300  # seconds for one cell
FEWER = {
    "03_what_decides_the_answer": {
        'checkpoints = ["tiny-shapes-seed0", "tiny-shapes-seed1", "tiny-shapes-seed2"]': (
            'checkpoints = ["tiny-shapes-seed0", "tiny-shapes-seed1"]'
        ),
        'held_out("color_vqa", 40), held_out("color_tqa", 40)': 'held_out("color_vqa", 8), held_out("color_tqa", 8)',
        "few = images[:12]": "few = images[:4]",
        'held_out("query_color", 40)': 'held_out("query_color", 8)',
        "kinds[kind][:20], kinds[kind][20:]": "kinds[kind][:4], kinds[kind][4:]",
        'held_out("query_color", 60)': 'held_out("query_color", 8)',
        "n = 10 if label in costly else 60": "n = 2 if label in costly else 8",
        "colors[:8]": "colors[:2]",
        'held_out("query_color", 120)': 'held_out("query_color", 12)',
        "np.arange(120)": "np.arange(12)",
    },
    "04_information_flow": {
        "rows = questions(15)": "rows = questions(3)",
        'others = ["tiny-shapes-seed0", "tiny-shapes-seed2"]': 'others = ["tiny-shapes-seed0"]',
        "questions(10)": "questions(2)",
    },
    "05_trace_and_edit": {
        "corrupt, n=12, **options": "corrupt, n=3, **options",
        "n=6": "n=2",
        "for i in (3, 14, 52, 81)": "for i in (3, 14)",
        "for clamp in (1e-4, 0.5, 1.0, 2.0, 4.0)": "for clamp in (1e-4, 1.0)",
    },
    "06_features": {
        "for _ in range(150)": "for _ in range(40)",
        "data[:32]": "data[:16]",
        "often[:40]": "often[:8]",
        "n_random=3": "n_random=1",
        "list(dict.fromkeys(best.values()))": "list(dict.fromkeys(best.values()))[:2]",
        "in best.items():\n    written": "in list(best.items())[:2]:\n    written",
    },
}
"""Smaller numbers of questions and checkpoints in place of the notebooks' own: tests see that every cell runs."""


class ThisInterpreter(AsyncKernelManager):
    """A kernel of this very Python, whatever kernels the user has installed under the name python3."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return [sys.executable, *super().format_kernel_cmd(extra_arguments)[1:]]


@pytest.fixture(scope="module")
def kernel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ThisInterpreter]:
    """One kernel for all notebooks, most of whose time would be imports."""
    manager = ThisInterpreter(kernel_name="python3")
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "JUPYTER_PLATFORM_DIRS": "1"}
    settings["OMP_NUM_THREADS"] = "1"  # as in conftest: on tensors this small, threads only wait
    with quiet():
        asyncio.run(manager.start_kernel(cwd=str(tmp_path_factory.mktemp("kernel")), env=os.environ | settings))
    yield manager
    with quiet():
        asyncio.run(manager.shutdown_kernel(now=True))


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings of the notebook machinery; what the notebooks warn of stays in their outputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
        gc.collect()  # sockets warn when they are collected: here, and not in whatever test comes next


def fresh_start(folder: Path) -> nbformat.NotebookNode:
    """A first cell that takes away what the notebook before has left."""
    return nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {folder}")


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace('"tiny-shapes"', repr(MODEL))
    return notebook


def ask_less(notebook: nbformat.NotebookNode, stem: str) -> None:
    """Put smaller numbers in place of the notebook's; each of them must be there."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for number, fewer in FEWER.get(stem, {}).items():
        assert any(number in cell.source for cell in cells), f"{stem} has no {number!r} any more"
        for cell in cells:
            cell.source = cell.source.replace(number, fewer)


def test_there_are_notebooks():
    assert [path.name for path in NOTEBOOKS][:1] == ["01_first_look.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_valid_and_say_what_they_do(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert path.stat().st_size < 1_500_000


@pytest.mark.notebook
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(path, tmp_path, kernel):
    notebook = read(path)
    ask_less(notebook, path.stem)
    notebook.cells.insert(0, fresh_start(tmp_path))
    with quiet():
        asyncio.run(NotebookClient(notebook, km=kernel, timeout=TIMEOUT).async_execute())
    for cell in notebook.cells:
        streams = [output for output in cell.get("outputs", []) if output.output_type == "stream"]
        written = "".join(stream.text for stream in streams if stream.name == "stderr")
        ours = [line for line in written.splitlines() if "Warning" in line and "hooked_llava" in line]
        assert not ours, f"a cell makes us warn: {ours}\n{cell.source}"
