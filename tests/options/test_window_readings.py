"""A way to count windows is one entry: with it come and go the option of the commands and the words of the page."""

from __future__ import annotations

from typing import Any

import pytest

from hooked_llava.analysis import causal_trace
from hooked_llava.errors import InputError
from hooked_llava.options.window_readings import WINDOW_READINGS, Reading, shown_window
from hooked_llava.viz.pages.trace import trace_page
from tests.pairs import as_users_run
from tests.registries import help_after, put_back

CHANGE = "from hooked_llava.options.window_readings import WINDOW_READINGS\n"
QUESTION = "Who made the star?"


@pytest.mark.parametrize("command", ["trace", "edit"])
def test_the_commands_offer_what_the_table_holds(command):
    assert "<centered|released>" in help_after(command, CHANGE)
    without = help_after(command, CHANGE + "del WINDOW_READINGS['released']")
    assert "<centered>" in without
    assert "released: 2" not in without


def test_a_new_entry_is_known_to_the_trace_and_to_its_page(tiny_shapes):
    inputs = tiny_shapes.prepare(QUESTION)
    how: dict[str, Any] = {"corruption": "the ring", "window": 2, "kinds": ("resid",), "window_reading": "whole"}
    with as_users_run(), put_back(WINDOW_READINGS) as table:
        table["whole"] = Reading(
            function="tests.options.test_window_readings:whole", meaning="", shown="all of {width}"
        )
        trace = causal_trace(tiny_shapes, inputs, "the star", **how)
        assert "all of 2" in trace_page(tiny_shapes, inputs, "the star", **how).html
    at = trace.restored.sel(position=int(trace.position[-1])).values.ravel()
    assert len(set(at)) == 1
    assert at[0] == pytest.approx(float(trace.p_clean))
    with as_users_run(), pytest.raises(InputError, match="window_reading='whole'.*'centered'.*'released'"):
        causal_trace(tiny_shapes, inputs, "the star", **how)


def whole(center: int, width: int, n_layers: int) -> range:
    return range(n_layers)


@pytest.mark.parametrize(
    ("width", "reading", "said"),
    [(1, "released", "one layer"), (2, "centered", "2 layers"), (2, "released", "5 layers at a time (window 2")],
)
def test_how_many_layers_in_words(width, reading, said):
    assert shown_window(width, reading).startswith(said)
