"""A method of editing is one entry: with it come and go the command's option and the lines of docs and page."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import replace

import pytest

from hooked_llava.editing import ROME_RELEASED, EditRequest, finetune, multedit, rome
from hooked_llava.options.edit_methods import EDIT_METHODS, EditMethod, markdown_table
from hooked_llava.viz.pages.edit import edit_page
from tests.cli.running import refused
from tests.registries import help_after, put_back

QUESTION = "Who made the star?"


@pytest.fixture
def table() -> Iterator[dict[str, EditMethod]]:
    with put_back(EDIT_METHODS) as table:
        yield table


def help_of_edit(change: str = "") -> str:
    return help_after("edit", f"from hooked_llava.options.edit_methods import EDIT_METHODS\n{change}")


def test_every_method_computes_an_edit_that_says_its_name(tiny_shapes):
    request = EditRequest(QUESTION, "Boris")
    for name in ("multedit", "finetune"):  # the others need a covariance, see tests/cli
        options = {"layer": 4, "layers": 4, "position": "last"}
        taken = {option: options[option] for option in EDIT_METHODS[name].options if option in options}
        assert EDIT_METHODS[name].compute(tiny_shapes, request, **taken).method["name"] == name


def test_an_entry_sets_arguments_of_its_function(tiny_shapes):
    entry = replace(EDIT_METHODS["multedit"], settings={"steps": 30, "lr": 0.1})
    how = {"layer": 4, "position": "last", "lr": 0.2}
    edit = entry.compute(tiny_shapes, EditRequest(QUESTION, "Boris"), **how)
    assert (edit.method["steps"], edit.method["lr"]) == (30, 0.2)  # what is given goes before what is set
    taken = set(inspect.signature(rome).parameters)
    assert EDIT_METHODS["rome-released"].settings is ROME_RELEASED
    assert taken >= set(ROME_RELEASED)


def test_a_method_that_is_removed_is_gone_everywhere(tiny_shapes, table):
    assert "finetune" in help_of_edit()
    assert "finetune" not in help_of_edit("del EDIT_METHODS['finetune']")
    inputs = tiny_shapes.prepare(QUESTION)
    edit = finetune(tiny_shapes, EditRequest(inputs, "Boris"), layers=4)
    explanation = table["finetune"].explanation
    assert explanation in edit_page(tiny_shapes, inputs, edit, max_new_tokens=1).html
    assert "`finetune`" in markdown_table()
    del table["finetune"]
    assert explanation not in edit_page(tiny_shapes, inputs, edit, max_new_tokens=1).html
    assert "`finetune`" not in markdown_table()


def test_the_page_says_what_a_method_does(tiny_shapes, table):
    inputs = tiny_shapes.prepare(QUESTION)
    edit = multedit(tiny_shapes, EditRequest(inputs, "Boris"), layer=3, position="last")
    table["multedit"] = EditMethod(function="", meaning="", explanation="Magic was used.", options=())
    assert "Magic was used. All other weights are as they were" in edit_page(tiny_shapes, inputs, edit).html


def test_unknown_methods_are_refused_by_the_command():
    said = refused("edit", "demo", QUESTION, "-t", "red", "--method", "surgery")
    assert "surgery" in said
    assert "rome" in said
