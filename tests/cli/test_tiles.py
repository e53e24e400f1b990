"""Every command that draws a page, with a model that cuts images into tiles and an image that is not square."""

from __future__ import annotations

from typing import Any

import pytest

from hooked_llava.model.llava import HookedLLaVA
from tests.cli.running import QUESTION, run
from tests.tiled import drawn, make_hf, processor_of


@pytest.fixture(scope="module")
def files(tmp_path_factory: Any) -> dict[str, str]:
    """A checkpoint and two images."""
    folder = tmp_path_factory.mktemp("tiled")
    HookedLLaVA.from_hf(make_hf("next"), processor_of("next")).save_pretrained(folder / "checkpoint")
    for name, one in zip(("clean", "other"), drawn((24, 100), (24, 100)), strict=True):
        one.save(folder / f"{name}.png")
    return {name: str(folder / name) for name in ("checkpoint", "clean.png", "other.png")}


COMMANDS = {
    "explain": ("clean.png", QUESTION, "--max-new-tokens", "2"),
    "patch": ("clean.png", "other.png", QUESTION, "--answer", "red", "--versus", "blue", "--max-new-tokens", "1"),
    "knockout": (
        *("clean.png", QUESTION, "--box", "20,5,60,20", "--window", "1", "--max-new-tokens", "1"),
        *("--edge", "fine->last", "--edge", "newlines->last", "--edge", "object->question"),
    ),
    "probability": ("clean.png", QUESTION, "--answer", "red", "--max-new-tokens", "1"),
    "trace": ("clean.png", QUESTION, "-c", "the star", "--replace", "a circle", "--max-new-tokens", "1"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_pages_of_images_of_several_grids(command: str, files: dict[str, str], tmp_path: Any) -> None:
    page = tmp_path / "page.html"
    arguments = [files.get(one, one) for one in COMMANDS[command]]
    result = run(command, *arguments, "-m", files["checkpoint"], "-o", str(page))
    assert result.exit_code == 0, result.stderr or result.exception
    html = page.read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    if command in ("explain", "patch"):
        assert ">image, base, 16 positions<" in html
        assert ">image, fine, 18 positions<" in html
