from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.errors import InputError
from hooked_llava.viz import faithfulness_curves


def curve(n_draws: int = 2, pairs: int = 0) -> xr.Dataset:
    values = {
        "faithfulness": [[0.0, 0.6, 1.0], [0.0, 0.9, 1.0]],
        "random": [[0.0, 0.1, 1.0], [0.0, 0.3, 1.0]][:n_draws],
    }
    parts = {
        n: ((a, "size"), np.reshape(values[n], (-1, 3))) for n, a in (("faithfulness", "scores"), ("random", "draw"))
    }
    found = xr.Dataset(parts, coords={"scores": ["EAP", "EAP-IG"], "size": [0, 5, 50], "draw": range(n_draws)})
    found = found.assign_attrs(n_edges=50, analysis="faithfulness_curve")
    return xr.concat([found, 2 * found][:pairs], "pair", combine_attrs="override") if pairs else found


def test_a_curve_for_each_scoring_and_the_control_with_its_range() -> None:
    axes = faithfulness_curves(curve()).axes[0]
    zero, one, *lines = axes.lines
    assert [np.asarray(line.get_ydata())[0] for line in (zero, one)] == [0, 1]
    assert [line.get_label() for line in lines] == ["EAP", "EAP-IG", "random edges"]
    assert [np.asarray(line.get_ydata())[1] for line in lines] == pytest.approx([0.6, 0.9, 0.2])
    (band,) = axes.collections
    assert band.get_datalim(axes.transData).y1 == pytest.approx(1)
    assert axes.get_xlabel() == "edges of the circuit (of 50)"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "5", "50"]


def test_pairs_are_averaged_and_a_control_may_lack() -> None:
    axes = faithfulness_curves(curve(0, pairs=2)).axes[0]
    assert [np.asarray(line.get_ydata())[1] for line in axes.lines[2:]] == pytest.approx([0.9, 1.35])
    assert not axes.collections
    with pytest.raises(InputError, match="faithfulness_curves.*faithfulness_curve"):
        faithfulness_curves(curve().drop_vars("random"))
