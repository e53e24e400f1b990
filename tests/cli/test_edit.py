from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from hooked_llava.analysis import causal_trace
from hooked_llava.cli.common import PromptOptions
from hooked_llava.cli.edit_probes import OtherQuestions, probes_of
from hooked_llava.editing import Edit, EditRequest, key_covariance, key_covariances, multedit
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.question import question_text
from hooked_llava.toy.facts import fact_answer
from hooked_llava.toy.images import image_path
from hooked_llava.toy.objects import SHAPES
from tests.cli.running import QUESTION, refused, run

LAST = ("--layer", "1", "--position", "last", "--max-new-tokens", "2")


def table(stdout: str) -> dict[str, list[str]]:
    """Rows of the probes, by their names."""
    rows = [re.split(r"\s{2,}", line.strip()) for line in stdout.splitlines()]
    return {row[0]: row[1:] for row in rows if len(row) == 6 and row[1] in ("change", "stay")}


@pytest.fixture
def loaded(monkeypatch):
    """Models that the command loads, with their weights as they were then."""
    seen: list[tuple[HookedLLaVA, dict[str, torch.Tensor]]] = []
    prepare = PromptOptions.prepare

    def recording(options):
        model, inputs = prepare(options)
        seen.append((model, {name: p.detach().clone() for name, p in model.named_parameters()}))
        return model, inputs

    monkeypatch.setattr(PromptOptions, "prepare", recording)
    return seen


def untouched(loaded) -> bool:
    model, weights = loaded[-1]
    return all(torch.equal(weights[name], p) for name, p in model.named_parameters())


def test_the_embedded_model_is_edited_out_of_the_box(loaded, tmp_path):
    page, kept = tmp_path / "edit.html", tmp_path / "edit.safetensors"
    arguments = ("-c", "this shape", "-t", "Boris", "-o", str(page), "--save", str(kept))
    result = run("edit", "one-shape", "Who made this shape?", *arguments)
    assert result.exit_code == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "Who made this shape?"
    model, _ = loaded[-1]
    inputs = model.prepare("Who made this shape?", str(image_path("one-shape")))
    assert lines[1].startswith(f"before  {model.generate(inputs)}  P(")
    assert lines[2].startswith("after   Boris  P(")
    assert "multedit, layer 3, position last: rank 1, " in result.stdout
    probes = table(result.stdout)
    assert probes["the edited question"][:4] == ["change", "1", "0.00", "1.00"]
    for name in ("other images", "other words", "by name"):
        assert probes[name][0] == "change"
        assert float(probes[name][3]) > 0.6
    for name in ("other shapes", "other shapes, by name", "other relations", "colors", "unrelated questions"):
        assert probes[name][0] == "stay"
        assert float(probes[name][3]) > 0.8
    assert untouched(loaded)
    assert page.read_text().startswith("<!doctype html>")
    with Edit.load(kept, model).applied():
        assert model.generate(inputs) == "Boris"


def test_a_fact_asked_by_name_is_not_probed_with_itself(tiny_shapes):
    question = "Who made the star?"
    asked = PromptOptions(first=question)
    found = probes_of(tiny_shapes, tiny_shapes.prepare(question), asked, "Boris", OtherQuestions())
    texts = {probe.name: [question_text(one) for one in probe.prompts] for probe in found}
    assert texts["by name"] == ["Who is the maker of the star?", "By whom was the star made?"]
    assert texts["other images"] == ["Who made this shape?"] * 3
    assert "Who made the ring?" in texts["other shapes, by name"]
    expected = {probe.name: probe.expected for probe in found}
    assert expected["by name"] == "Boris"
    assert expected["other shapes, by name"][0] == fact_answer("maker", SHAPES[0])


def test_only_questions_about_the_image_see_it(tiny_shapes):
    inputs = tiny_shapes.prepare(QUESTION, str(image_path("demo")))
    others = OtherQuestions(
        keep=["Who?"], reword=["What color?"], ask=["Where?", "When?"], ask_text=["Who made the star?"]
    )
    asked = PromptOptions(first="demo", second=QUESTION)
    found = {probe.name: probe for probe in probes_of(tiny_shapes, inputs, asked, "Blue", others)}
    assert {name: probe.prompts.n_images for name, probe in found.items()} == {
        "in other words": 1,
        "other questions": 2,
        "other questions, without the image": 0,
        "questions that were kept": 1,
    }


def test_only_facts_of_the_embedded_world_have_probes_of_their_own(tiny_shapes):
    demo = str(image_path("demo"))
    models = ((QUESTION, "tiny-shapes"), ("Who made the house?", "tiny-shapes"), ("Who made the star?", "another"))
    for question, model in models:
        inputs = tiny_shapes.prepare(question, demo)
        asked = PromptOptions(first="demo", second=question, model=model)
        assert probes_of(tiny_shapes, inputs, asked, "Blue", OtherQuestions()) == []


def test_questions_are_asked_before_and_after(checkpoint, image, loaded, tmp_path):
    page = str(tmp_path / "edit.html")
    others = (
        "--ask",
        "Is the star red or blue?",
        "--ask",
        "What color is the ring?",
        "--ask-text",
        "Who made the ring?",
    )
    options = ("--clamp", "50", "-o", page, "-m", checkpoint, *LAST)
    result = run("edit", image, QUESTION, "-t", "red", *others, "--reword", "What is the star?", *options)
    assert result.exit_code == 0, result.stderr
    probes = table(result.stdout)
    assert {name: row[:2] for name, row in probes.items()} == {
        "the edited question": ["change", "1"],
        "in other words": ["change", "1"],
        "other questions": ["stay", "2"],
        "other questions, without the image": ["stay", "1"],
    }
    model, _ = loaded[-1]
    inputs = model.prepare(QUESTION, image)
    edit = multedit(model, EditRequest(inputs, "red"), layer=1, position="last", clamp=50.0)
    alone, reworded = model.prepare("Who made the ring?"), model.prepare("What is the star?", image)
    before = [model(asked)[0, -1].argmax() for asked in (alone, reworded)]
    with edit.applied():
        after = [model(asked)[0, -1].argmax() for asked in (alone, reworded)]
    assert probes["other questions, without the image"][3] == f"{float(before[0] == after[0]):.2f}"
    assert probes["in other words"][3] == f"{float(after[1] == model.to_single_token('red')):.2f}"
    assert untouched(loaded)


def test_layer_position_and_strength_are_taken(checkpoint, image, loaded, tmp_path):
    kept = tmp_path / "edit.safetensors"
    options = ("-m", checkpoint, "-o", str(tmp_path / "edit.html"), "--save", str(kept), "--max-new-tokens", "1")
    where = ("--layer", "-2", "--position", "constraint", "-c", "the star", "--lam", "0.5", "--clamp", "2")
    result = run("edit", image, QUESTION, "-t", "red", *where, *options)
    assert result.exit_code == 0, result.stderr
    model, _ = loaded[-1]
    lines = result.stderr.strip().splitlines()
    assert [line.startswith("Warning: With the edit 'USER:") for line in lines] == [False, True]  # the image is cropped
    assert lines[0].startswith("Warning: The processor crops")
    edit = Edit.load(kept, model)
    assert edit.layers == [model.cfg.n_layers - 2]
    assert {name: edit.method[name] for name in ("position", "lam", "clamp")} == {
        "position": "constraint",
        "lam": 0.5,
        "clamp": 2.0,
    }


def test_kept_questions_keep_their_key(checkpoint, image, loaded, tmp_path):
    kept, other = tmp_path / "edit.safetensors", "What color is the ring?"
    options = ("-m", checkpoint, "-o", str(tmp_path / "edit.html"), "--save", str(kept), *LAST)
    result = run("edit", image, QUESTION, "-t", "red", "--keep", other, "--lam", "0", *options)
    assert result.exit_code == 0, result.stderr
    assert table(result.stdout)["questions that were kept"][:2] == ["stay", "1"]
    model, _ = loaded[-1]
    edit = Edit.load(kept, model)
    assert edit.method["n_kept_keys"] == 1
    (change,) = edit.changes.values()
    for question, moves in ((QUESTION, True), (other, False)):
        _, cache = model.run_with_cache(model.prepare(question, image), names_filter="blocks.1.mlp.hook_post")
        moved = change.matrix() @ cache["blocks.1.mlp.hook_post"][0, -1]
        assert bool(moved.norm() > 1e-3) == moves
    at = ("--position", "constraint", "-c", "the star", "--layer", "0")
    result = run("edit", image, QUESTION, "-t", "red", "--keep", "Who made the star?", *options, *at)
    assert result.exit_code == 0, result.stderr
    assert Edit.load(kept, model).method["position"] == "constraint"


def test_auto_edits_where_the_trace_says(tmp_path):
    kept = tmp_path / "edit.safetensors"
    arguments = ("-c", "this shape", "-t", "Boris", "--layer", "auto", "--ask", "What shape is this?")
    files = ("-o", str(tmp_path / "edit.html"), "--save", str(kept))
    result = run("edit", "one-shape", "Who made this shape?", *arguments, "--replace", "the ring", *files)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    inputs = model.prepare("Who made this shape?", str(image_path("one-shape")))
    trace = causal_trace(model, inputs, "this shape", corruption="the ring", kinds=("mlp",))
    effect = trace.indirect_effect.sel(kind="mlp", position=inputs.shape[1] - 1)
    assert Edit.load(kept, model).layers == [int(effect.values.argmax())]
    said = refused("edit", "one-shape", "Who made this shape?", *arguments, *files)
    assert "The trace's corruption hardly lowers the answer" in said
    assert "(On the command line: --replace WORDS, " in said
    said = refused("edit", "one-shape", "Who made this shape?", "-t", "Boris", "--layer", "auto", *files)
    assert "The layer is chosen by tracing the constraint: name it" in said


def test_the_trace_that_chooses_the_layer_may_restore_windows(tmp_path):
    kept = tmp_path / "edit.safetensors"
    asked = ("edit", "one-shape", "Who made this shape?", "-c", "this shape", "-t", "Boris", "--replace", "the ring")
    files = ("-o", str(tmp_path / "edit.html"), "--save", str(kept), "--ask", "What shape is this?")
    windows = ("--window", "2", "--window-reading", "released")
    result = run(*asked, *windows, "--layer", "auto", *files)
    assert result.exit_code == 0, result.stderr
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    inputs = model.prepare("Who made this shape?", str(image_path("one-shape")))
    options = {"corruption": "the ring", "kinds": ("mlp",), "positions": "last", "window": 2}
    effects = [
        causal_trace(model, inputs, "this shape", window_reading=reading, **options).indirect_effect.values.ravel()
        for reading in ("centered", "released")
    ]
    assert effects[0].argmax() != effects[1].argmax(), "otherwise the reading would not be seen"
    assert Edit.load(kept, model).layers == [int(effects[1].argmax())]
    for option in (windows[:2], windows[2:], ("--replace", "the ring")):
        said = refused("edit", "one-shape", "Who made this shape?", "-t", "Boris", "--layer", "3", *option, *files)
        assert f"{option[0]} belongs to a trace; give --layer auto, or --sweep" in said


def test_rome_takes_its_covariance_from_a_file(checkpoint, image, loaded, tmp_path):
    model = HookedLLaVA.from_pretrained(checkpoint)
    covariance, kept = tmp_path / "keys.safetensors", tmp_path / "edit.safetensors"
    prompts = [model.prepare([f"Who made the {shape}?", f"What color is the {shape}?"]) for shape in ("star", "ring")]
    key_covariance(model, prompts, layer=1, path=covariance)
    options = ("-m", checkpoint, "-o", str(tmp_path / "edit.html"), "--save", str(kept), *LAST)
    rome = ("edit", image, QUESTION, "-t", "red", "--method", "rome")
    result = run(*rome, "--covariance", str(covariance), *options)
    assert result.exit_code == 0, result.stderr
    assert "rome, layer 1, position last" in result.stdout
    assert (Edit.load(kept, loaded[-1][0]).method["name"], Edit.load(kept, loaded[-1][0]).method["lam"]) == (
        "rome",
        0.0,
    )
    assert "let key_covariance" in refused(*rome, *options)
    other = refused(*rome, "--covariance", str(covariance), *options, "--layer", "0")
    assert "is of layer 1, and layer 0 is edited" in other
    assert untouched(loaded)


def test_memit_takes_a_covariance_of_each_layer(checkpoint, image, loaded, tmp_path):
    model = HookedLLaVA.from_pretrained(checkpoint)
    kept, page = tmp_path / "edit.safetensors", tmp_path / "edit.html"
    files = [tmp_path / f"keys{layer}.safetensors" for layer in (0, 1)]
    prompts = [model.prepare([f"Who made the {shape}?" for shape in ("star", "ring")])]
    for file, one in zip(files, key_covariances(model, prompts, [0, 1]), strict=True):
        one.save(file, model)
    memit = ("edit", image, QUESTION, "-t", "red", "--method", "memit", "--n-layers", "2", "--lam", "1", *LAST)
    options = ("-m", checkpoint, "-o", str(page), "--save", str(kept))
    given = [("--covariance", str(file)) for file in files]
    result = run(*memit, *given[1], *given[0], *options)
    assert result.exit_code == 0, result.stderr
    assert "memit, layer 0, 1, position last: rank 1" in result.stdout
    edit = Edit.load(kept, loaded[-1][0])
    assert (edit.layers, edit.method["lam"], edit.method["clamp"]) == ([0, 1], 1.0, 0.75)
    assert "0.75 times the residual stream" in page.read_text(encoding="utf-8")
    assert "layer 0 and 1 is edited" in refused(*memit, *given[1], *options)
    assert "write that for layer 0 and 1" in refused(*memit, *options)
    assert untouched(loaded)


def test_rome_as_its_authors_run_it_is_a_method(checkpoint, image, loaded, tmp_path):
    model = HookedLLaVA.from_pretrained(checkpoint)
    covariance, kept, page = (tmp_path / name for name in ("keys.safetensors", "edit.safetensors", "edit.html"))
    key_covariance(model, [model.prepare(["Who made the star?", "Who made the ring?"])], layer=1, path=covariance)
    rome = ("edit", image, QUESTION, "-t", "red", "--method", "rome-released", "--covariance", str(covariance), *LAST)
    options = ("-m", checkpoint, "-o", str(page), "--save", str(kept))
    result = run(*rome, "-c", "the star", *options)
    assert result.exit_code == 0, result.stderr
    method = Edit.load(kept, loaded[-1][0]).method
    assert (method["name"], len(method["contexts"]), method["kl"], method["steps"]) == ("rome", 20, 0.0625, 19)
    assert "averaged over 20 besides" in page.read_text(encoding="utf-8")
    assert "rome-released keeps what is said of the constraint" in refused(*rome, *options)


def test_a_sweep_shows_the_layers(checkpoint, image, tmp_path):
    page = tmp_path / "edit.html"
    options = ("-m", checkpoint, "-o", str(page), *LAST)
    result = run("edit", image, QUESTION, "-t", "red", "-c", "the star", "--replace", "a circle", "--sweep", *options)
    assert result.exit_code == 0, result.stderr
    assert "At which layers it works" in page.read_text()
    assert "Dashed: the causal trace" in page.read_text()
    said = refused("edit", image, QUESTION, "-t", "red", "--sweep", "--keep", "Who made it?", *options)
    assert "--sweep edits by multedit and without --keep" in said


def test_what_does_not_fit_is_said_in_one_line_and_changes_nothing(checkpoint, image, loaded, tmp_path):
    files = ("-m", checkpoint, "-o", str(tmp_path / "page.html"), "--save", str(tmp_path / "kept"))

    def said(*arguments: str) -> str:
        message = refused("edit", image, QUESTION, *arguments, *files)
        assert "\n" not in message
        assert message.startswith("Error: ")
        return message

    target = ("-t", "red")
    assert "'square' does not occur in the question" in said(*target, "-c", "square", *LAST)
    assert "position='constraint' needs the request's constraint=" in said(
        *target, "--layer", "0", "--position", "constraint"
    )
    assert "no target; say what the model is to answer: --target" in said("-t", "", *LAST)
    assert "does not know 'zzz'" in said("-t", "zzz", *LAST)
    assert "layer=9 is out of range; this model has layers 0.." in said(*target, *LAST, "--layer", "9")
    assert "layer=-9 is out of range" in said(*target, *LAST, "--layer", "-9")
    assert "no span 'middle'" in said(*target, *LAST, "--position", "middle")
    assert "does not reach the answer" in said(*target, "-c", "star", "--position", "constraint", "--layer", "-1")
    assert "The update is singular" in said(*target, *LAST, "--lam", "0", "--keep", QUESTION)
    coarse = said(*target, *LAST, "--dtype", "bfloat16", "--clamp", "1e-4")
    assert "bfloat16 is too coarse for this update" in coarse
    assert "lam=-1.0 is not a weight" in said(*target, *LAST, "--lam", "-1")
    assert "clamp=0.0: expected positive numbers" in said(*target, *LAST, "--clamp", "0")
    assert len(loaded) == 11
    assert all(untouched([one]) for one in loaded)
    assert not list(tmp_path.glob("page*"))
    assert not list(tmp_path.glob("kept*"))


def test_what_does_not_fit_is_found_before_the_model_is_loaded(tmp_path):
    files = ("-m", "nowhere", "-o", str(tmp_path / "page.html"))
    assert refused("edit", "demo", QUESTION, *files).startswith(
        "Error: There is no target; say what the model is to answer"
    )
    assert "--layer last is no layer; expected a number, or auto" in refused(
        "edit", "demo", QUESTION, "-t", "red", "--layer", "last", *files
    )
    for where, problem in ((tmp_path, "is a folder"), (tmp_path / "no" / "edit", "is in a folder that does not exist")):
        said = refused("edit", "demo", QUESTION, "-t", "red", "--save", str(where), *files)
        assert f"--save {where} {problem}" in said
    assert not Path(files[-1]).exists()


def test_edit_stands_after_trace():
    commands = re.findall(r"^│ (\w+)", run("--help").stdout, re.MULTILINE)
    assert commands[-5:] == ["trace", "edit", "describe", "verify", "sae"]


def test_fine_tuning_is_a_method_too(checkpoint, image, loaded, tmp_path):
    kept, page = tmp_path / "edit.safetensors", tmp_path / "edit.html"
    options = ("-m", checkpoint, "-o", str(page), "--save", str(kept), "--layer", "1", "--max-new-tokens", "1")
    result = run("edit", image, QUESTION, "-t", "red", "--method", "finetune", *options)
    assert result.exit_code == 0, result.stderr
    assert "finetune, layer 1: full rank, " in result.stdout
    assert "were changed by gradient descent" in page.read_text(encoding="utf-8")
    edit = Edit.load(kept, loaded[-1][0])
    assert (edit.method["name"], edit.layers) == ("finetune", [1])
    assert untouched(loaded)


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("finetune", ("--clamp", "2")),
        ("finetune", ("--keep", "Who?")),
        ("multedit", ("--covariance", "f")),
        ("rome", ("--n-layers", "2")),
    ],
)
def test_options_of_another_method_are_refused(method, option):
    said = refused("edit", "demo", QUESTION, "-t", "red", "-m", "nowhere", "--method", method, *option)
    assert f"{option[0]} has no place with --method {method}" in said
