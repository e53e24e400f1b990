"""Every notebook runs from top to bottom, offline, in the interpreter that runs the tests."""

from __future__ import annotations

import asyncio
import gc
import os
import sys
import warnings
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


class ThisInterpreter(AsyncKernelManager):
    """A kernel of this very Python, whatever kernels the user has installed under the name python3."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        return [sys.executable, *super().format_kernel_cmd(extra_arguments)[1:]]


def read(path: Path) -> nbformat.NotebookNode:
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace('"tiny-shapes"', repr(MODEL))
    return notebook


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
def test_notebooks_run(path, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PLATFORM_DIRS", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as in conftest: on tensors this small, threads only wait
    notebook = read(path)
    client = NotebookClient(
        notebook,
        km=ThisInterpreter(kernel_name="python3"),
        timeout=TIMEOUT,
        resources={"metadata": {"path": str(tmp_path)}},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the notebook machinery; what the notebooks warn of stays in their outputs
        asyncio.run(client.async_execute())
        del client  # its sockets warn when they are collected: here, and not in whatever test comes next
        gc.collect()
    for cell in notebook.cells:
        streams = [output for output in cell.get("outputs", []) if output.output_type == "stream"]
        written = "".join(stream.text for stream in streams if stream.name == "stderr")
        ours = [line for line in written.splitlines() if "Warning" in line and "hooked_llava" in line]
        assert not ours, f"a cell makes us warn: {ours}\n{cell.source}"
