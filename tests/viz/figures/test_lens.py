from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from hooked_llava.analysis import logit_lens
from hooked_llava.errors import InputError
from hooked_llava.results.arrays import load, resid_coords, save
from hooked_llava.viz import answer_curve, lens_table


def test_lens_table_of_one_position_shows_words_by_rank(model, inputs):
    read = logit_lens(model, inputs, k=3)
    axes = lens_table(read).axes[0]
    assert np.allclose(axes.collections[0].get_array(), read["probability"].isel(position=0).values)
    assert len(axes.texts) == (model.cfg.n_layers + 1) * 3
    assert axes.texts[1].get_text() == str(read["token"].values[0, 0, 1])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "final"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]


def test_lens_table_of_several_positions_shows_the_best_word_of_each(model, inputs):
    read = logit_lens(model, inputs, positions="question", k=2)
    axes = lens_table(read).axes[0]
    assert np.allclose(axes.collections[0].get_array(), read["probability"].isel(rank=0).values)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["What", "color", "is", "the", "star", "?"]


def test_lens_shading_goes_from_0_to_1(model, inputs):
    assert lens_table(logit_lens(model, inputs)).axes[0].collections[0].get_clim() == (0.0, 1.0)


def test_answer_curve_has_a_line_for_each_answer(model, inputs):
    read = logit_lens(model, inputs, answers=["red", "blue"])
    axes = answer_curve(read).axes[0]
    assert [line.get_label() for line in axes.lines] == ["red", "blue"]
    for index, line in enumerate(axes.lines):
        assert np.allclose(line.get_ydata(), read["answer_probability"].values[:, 0, index])
    assert axes.get_xticklabels()[-1].get_text() == "final"


def test_answer_curve_of_many_layers_names_few_of_them():
    values = np.linspace(0, 1, 33)[:, None, None]
    read = xr.Dataset(
        {"answer_probability": (("layer", "position", "answer"), values)}, {**resid_coords(32), "answer": ["Red"]}
    )
    labels = [label.get_text() for label in answer_curve(read).axes[0].get_xticklabels()]
    assert labels[:3] == ["0", "5", "10"]
    assert labels[-1] == "final"
    assert len(labels) <= 17


def test_errors_say_what_is_missing(model, inputs):
    with pytest.raises(InputError, match=r"lens_table draws 'token', 'probability'.*got.*x \[y\]"):
        lens_table(xr.Dataset({"x": ("y", [1.0])}))
    with pytest.raises(InputError, match=r"'token'.*layer, position"):
        lens_table(xr.Dataset({name: ("layer", [1.0]) for name in ("token", "probability")}))
    with pytest.raises(InputError, match=r"answer_curve draws 'answer_probability' .* answers="):
        answer_curve(logit_lens(model, inputs))


@pytest.mark.parametrize("chosen", [[3], [0], [1, 2], [3, 1], slice(1, None)])
def test_chosen_layers_keep_their_names(model, inputs, chosen):
    read = logit_lens(model, inputs, answers=["red", "blue"]).isel(layer=chosen)
    expected = ["final" if i == model.cfg.n_layers else str(i) for i in read.layer.values]
    assert [label.get_text() for label in lens_table(read).axes[0].get_yticklabels()] == expected
    axes = answer_curve(read).axes[0]
    named = {float(at): label.get_text() for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True)}
    assert named == {float(layer): name for layer, name in zip(read.layer.values, expected, strict=True)}
    for line in axes.lines:
        assert line.get_xdata().tolist() == sorted(read.layer.values.tolist())
        word = line.get_label().split(" ")[0]
        values = read.answer_probability.isel(position=0).sortby("layer").sel(answer=word)
        assert np.allclose(line.get_ydata(), values)


def test_names_survive_arithmetic_and_files(model, inputs, tmp_path):
    read = logit_lens(model, inputs, answers=["red"])
    save(read, tmp_path / "lens")
    for result in (load(tmp_path / "lens"), read.assign(answer_probability=read.answer_probability * 0.5)):
        last = answer_curve(result.isel(layer=[1, -1])).axes[0].get_xticklabels()[-1]
        assert last.get_text() == "final"


def test_the_last_layer_of_another_hook_is_not_the_final_stream(model, inputs):
    read = logit_lens(model, inputs, hook="attn_out")
    axes = lens_table(read).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]
    assert axes.get_ylabel() == "attn_out, layer"
