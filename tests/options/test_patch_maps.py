"""A method of the patch map is one entry: with it come and go the command's option, the page's figure and the docs line."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hooked_llava.analysis.maps.methods import Drawn
from hooked_llava.analysis.patch_importance import patch_importance
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.patch_maps import PATCH_MAPS, PatchMap, markdown_table
from hooked_llava.results.image_axes import ImageAxes
from hooked_llava.viz.figures.overlay import patch_overlay
from hooked_llava.viz.pages.explain import explain
from tests.builders import make_hf_model
from tests.fixtures_processor import make_processor
from tests.registries import help_after, put_back

FLAT = PatchMap(
    function=f"{__name__}:flat",
    title="Flat map",
    meaning="the same number for every patch",
    units="nothing",
    options=("steps",),
)


def flat(model, prompts, target, steps) -> Drawn:
    where = ImageAxes.of(prompts).positions_of_all(prompts)
    return Drawn(torch.full(where.shape, float(steps)), {"target": "any"})


@pytest.fixture(scope="module")
def model() -> HookedLLaVA:
    return HookedLLaVA.from_hf(make_hf_model(), make_processor())


@pytest.fixture(scope="module")
def inputs(model):
    return model.prepare("What color is the star?", torch.rand(3, 16, 16))


@pytest.fixture
def table() -> Iterator[dict[str, PatchMap]]:
    with put_back(PATCH_MAPS) as table:
        yield table


def help_of_explain(change: str = "") -> str:
    return help_after("explain", f"from hooked_llava.options.patch_maps import PATCH_MAPS, PatchMap\n{change}")


def test_every_function_is_there(model, inputs):
    for name, method in PATCH_MAPS.items():
        found = patch_importance(model, inputs, 7, method=name)
        assert found.attrs["units"] == method.units
        figure = patch_overlay(inputs, found)
        assert figure.axes[0].get_title("left").startswith(method.title)


def test_a_method_that_is_removed_is_gone_everywhere(model, inputs, table):
    assert "rollout" in help_of_explain()
    assert "rollout" not in help_of_explain("del PATCH_MAPS['rollout']")
    assert "`rollout`" in markdown_table()
    del table["rollout"]
    assert "`rollout`" not in markdown_table()
    for draw in (
        lambda: patch_importance(model, inputs, method="rollout"),
        lambda: explain(model, inputs, patches="rollout"),
    ):
        with pytest.raises(InputError, match=r"'rollout'; expected one of"):
            draw()


def test_a_method_that_is_added_is_everywhere(model, inputs, table):
    assert "flat" in help_of_explain("PATCH_MAPS['flat'] = PatchMap(function='', title='', meaning='', units='')")
    table["flat"] = FLAT
    assert "| `flat` | Flat map | `steps` | the same number for every patch |" in markdown_table()
    assert (patch_importance(model, inputs, method="flat", steps=3) == 3).all()
    page = explain(model, inputs, patches="flat", occlusion=False, max_new_tokens=1).html
    assert "<h3>Flat map</h3>" in page
    assert "the same number for every patch" in page
