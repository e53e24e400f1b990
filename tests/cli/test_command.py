"""Functions become commands: groups of options, defaults of the library, warnings in one line."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from hooked_llava.cli.command import as_arguments, command
from hooked_llava.cli.explain import ExplainOptions
from hooked_llava.cli.knockout import KnockoutOptions
from hooked_llava.cli.patch import PatchOptions
from hooked_llava.cli.probability import ProbabilityOptions
from hooked_llava.errors import HookedLLaVAWarning, InputError, warn_user
from hooked_llava.viz import explain, knockout_page, patching_report, probability_page
from tests.cli.running import QUESTION, run


@dataclass(frozen=True, kw_only=True)
class Size:
    width: int = 3
    height: int = 4


def ran(function: Callable[..., None], *typed: str):
    app = typer.Typer()
    made = command("example")(function)
    app.command(epilog=made.epilog)(made.run)
    return CliRunner().invoke(app, list(typed), env={"COLUMNS": "100", "TERM": "dumb"})


def test_the_fields_of_a_group_are_options():
    def area(name: str, size: Size, unit: str = "cm") -> None:
        """How large it is."""
        typer.echo(f"{name} {size.width * size.height} {unit}")

    assert ran(area, "tile", "--width", "5").stdout == "tile 20 cm\n"
    assert ran(area, "tile", "--unit", "m").stdout == "tile 12 m\n"
    told = ran(area, "--help").stdout
    assert "hooked-llava example" in told
    assert "How large it is." in told
    assert as_arguments(Size(width=1)) == {"width": 1, "height": 4}


@pytest.mark.parametrize(
    ("group", "functions"),
    [
        (ExplainOptions, [explain]),
        (PatchOptions, [patching_report]),
        (KnockoutOptions, [knockout_page]),
        (ProbabilityOptions, [probability_page]),
    ],
)
def test_defaults_are_those_of_the_function_that_takes_them(group: type[Any], functions: list[Callable[..., Any]]):
    for function in functions:
        taken = inspect.signature(function).parameters
        given = as_arguments(group())
        assert set(given) <= set(taken)
        known = {name: value for name, value in given.items() if taken[name].default is not inspect.Parameter.empty}
        assert known == {name: taken[name].default for name in known}
    assert len(fields(group)) == len(given)


def test_warnings_of_the_library_are_a_line_each_and_once():
    def warned() -> None:
        for text in ("look here", "look here", "and there"):
            warn_user(text, HookedLLaVAWarning)
        typer.echo("done")

    result = ran(warned)
    assert result.stdout == "done\n"
    assert result.stderr == "Warning: look here\nWarning: and there\n"


def test_warnings_are_said_before_an_error():
    def refused() -> None:
        warn_user("look here", HookedLLaVAWarning)
        raise InputError("No.")

    assert ran(refused).stderr == "Warning: look here\nError: No.\n"


def test_other_warnings_are_left_to_python():
    def other() -> None:
        warnings.warn("of a package", FutureWarning, stacklevel=1)

    with pytest.warns(FutureWarning, match="of a package"):
        assert ran(other).stderr == ""


def test_a_cropped_image_is_said_in_one_line(checkpoint, tmp_path):
    path = tmp_path / "wide.png"
    Image.fromarray(np.zeros((20, 90, 3), dtype=np.uint8)).save(path)
    result = run("ask", str(path), QUESTION, "-m", checkpoint, "--max-new-tokens", "1")
    assert result.exit_code == 0
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("Warning: The processor crops")
