from __future__ import annotations

import pytest

from hooked_llava.analysis import answer_probability, probability_summary
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.arrays import load
from hooked_llava.toy.gqa_tables import write_gqa
from tests.cli.running import QUESTION, refused, run


def numbers(said: str) -> dict[str, list[str]]:
    lines = (line.split() for line in said.splitlines())
    return {" ".join(words[:-4]): words[-4:] for words in lines if len(words) in (5, 6) and words[-1].isdigit()}


def test_one_question_prints_the_curves_in_numbers_and_writes_a_page(checkpoint, image, tmp_path):
    page = tmp_path / "page.html"
    options = ("--answer", "red", "--false-option", "blue", "-o", str(page), "-m", checkpoint)
    result = run("probability", image, QUESTION, "--max-new-tokens", "2", *options)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained(checkpoint)
    expected = probability_summary(answer_probability(model, model.prepare(QUESTION, image), "red", "blue"))
    found = numbers(result.stdout)
    assert set(found) >= {"lower", "false lower"}
    for form, (raw, raw_layer, final, final_layer) in found.items():
        for norm, peak, layer in (("none", raw, raw_layer), ("final", final, final_layer)):
            own = expected.sel(norm=norm, form=form)
            assert float(peak) == pytest.approx(float(own.peak), abs=0.00051)
            assert int(layer) == int(own.peak_layer)
    assert page.read_text().startswith("<!doctype html>")


def test_a_table_of_questions_and_its_result_file(checkpoint, tmp_path):
    folder = write_gqa(tmp_path / "gqa", 2, kinds=["ChooseAttr", "QueryAttr"])
    page, kept = tmp_path / "page.html", tmp_path / "probability.safetensors"
    options = ("-o", str(page), "-m", checkpoint, "--images", str(folder), "--all", "--results", str(kept))
    result = run("probability", "--dataset", str(folder), *options)
    assert result.exit_code == 0, result.stderr
    assert "over 4 questions" in result.stdout
    assert "lower" in numbers(result.stdout)
    found = load(kept)
    assert found.answer_probability.dims == ("question", "norm", "layer", "form")
    assert found.attrs["tail"] == " \nAnswer the question using a single word or phrase."
    assert page.read_text().startswith("<!doctype html>")
    again = run("probability", "--dataset", str(folder), *options)
    assert again.stdout == result.stdout, "a finished study is read back"


def test_what_does_not_fit_is_said_in_one_line(checkpoint, image, tmp_path):
    options = ("-m", checkpoint, "-o", str(tmp_path / "page.html"))
    assert "--limit belongs to a table" in refused("probability", image, QUESTION, "--limit", "3", *options)
    table = ("--dataset", "tiny-shapes")
    assert "--answer belongs to one question" in refused("probability", *table, "--answer", "red", *options)
    assert "brings its own questions" in refused("probability", QUESTION, *table, *options)
