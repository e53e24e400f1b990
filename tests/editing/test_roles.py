"""A role of probes is one entry: with it come and go its number in the summary, its color and its line in the docs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import xarray as xr

from hooked_llava.editing import Probe, evaluate_edit, summary
from hooked_llava.editing.edit import Edit
from hooked_llava.editing.roles import PROBE_ROLES, ProbeRole, markdown_table
from hooked_llava.errors import InputError
from hooked_llava.viz import probe_bars
from hooked_llava.viz.figures.edit import role_colors
from tests.registries import put_back


@pytest.fixture
def table() -> Iterator[dict[str, ProbeRole]]:
    with put_back(PROBE_ROLES) as table:
        yield table


def measured(*roles: str) -> xr.Dataset:
    values = {"accuracy_before": 0.75, "accuracy": 0.5, "kl": 0.125, "n": 4.0}
    columns = {name: ("probe", [value] * len(roles)) for name, value in values.items()}
    return xr.Dataset(columns, coords={"probe": list(roles), "role": ("probe", list(roles))})


def test_every_role_has_its_number_its_color_and_its_line():
    result = measured(*PROBE_ROLES)
    assert summary(result) == {
        "efficacy": 0.5,
        "generalisation": 0.5,
        "specificity_drop": 25.0,
        "locality_kl": 0.125,
    }
    assert len({*role_colors().values()}) == len(PROBE_ROLES)
    labels = [text.get_text() for text in probe_bars(result).legends[0].get_texts()]
    assert labels[1:] == [f"{name}: {role.wanted}" for name, role in PROBE_ROLES.items()]
    assert all(f"| `{name}` |" in markdown_table() for name in PROBE_ROLES)


def test_a_role_that_is_removed_is_gone_everywhere(table, tiny_shapes):
    del table["locality"]
    assert "`locality`" not in markdown_table()
    assert "locality" not in role_colors()
    assert "locality_kl" not in summary(measured("efficacy", "locality"))
    with pytest.raises(InputError, match=r"'far'.*'locality'.*efficacy, generalisation, specificity"):
        evaluate_edit(tiny_shapes, Edit(tiny_shapes, {}), [Probe("far", "locality", "Who made the star?")])


def test_a_role_that_is_added_is_measured(table):
    table["side effects"] = replace(table["locality"], measure="side_effects")
    assert summary(measured("side effects")) == {"side_effects": 0.125}
    assert "side effects" in role_colors()
