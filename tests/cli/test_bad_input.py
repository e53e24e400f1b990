"""Wrong input typed into the shell: the answer names what was given and what was expected, and ends without a traceback."""

from __future__ import annotations

import re

import pytest

from tests.cli.running import QUESTION, run

FACT = "Who made the star?"
DEMO = ("demo", QUESTION)
PAIR = ("demo", "demo-blue-star", QUESTION)
KINDS = "QueryAttr"
# What is typed, and what must be said in this order; {folder} is a folder with bad files.
CASES = {
    "a missing image": (("ask", "missing.png", QUESTION), "missing.png.*demo"),
    "a folder as image": (("ask", "{folder}", QUESTION), "folder.*file"),
    "text as image": (("ask", "{folder}/text.png", QUESTION), r"text\.png.*PNG"),
    "no question": (("ask", "demo"), "'demo'.*question"),
    "an empty question": (("ask", "demo", ""), "empty.*word"),
    "an unknown model": (("ask", *DEMO, "-m", "tiny-shape"), "'tiny-shape'.*tiny-shapes"),
    "a folder without a model": (("ask", *DEMO, "-m", "{folder}"), "config.json.*Hugging Face"),
    "a negative number": (("ask", *DEMO, "--top", "-3"), "--top.*-3.*1"),
    "a word as number": (("ask", *DEMO, "--max-new-tokens", "many"), "--max-new-tokens.*many.*whole number"),
    "a wrong dtype": (("ask", *DEMO, "--dtype", "float8"), "--dtype.*float8.*bfloat16"),
    "a wrong device": (("ask", *DEMO, "--device", "tpu"), "--device tpu.*cpu"),
    "an unknown template": (("ask", *DEMO, "--template", "nope"), "'nope'.*llava-1.5"),
    "options in conflict": (("ask", "--no-image", *DEMO), "--no-image.*'demo'"),
    "an unknown command": (("explian", *DEMO), "explian.*explain"),
    "a window of too many layers": (("knockout", *DEMO, "--window", "99"), "window.*99.*1 to 11"),
    "an unknown method": (("explain", *DEMO, "--patches", "gradcam"), "--patches.*gradcam.*occlusion"),
    "an output nowhere": (("explain", *DEMO, "-o", "{folder}/no/page.html"), r"--output .*no/page\.html.*folder"),
    "an answer of several words": (("explain", *DEMO, "--answer", "Orange Red"), "'Orange Red'.*one token"),
    "twice the same answer": (("explain", *DEMO, "--versus", "Orange"), "answer.*baseline.*'Orange'"),
    "a pair that is answered alike": (("patch", "demo", "demo", QUESTION), "'Orange'.*--answer"),
    "an unknown direction": (("patch", *PAIR, "--direction", "sideways"), "--direction.*sideways.*denoise"),
    "an unknown span": (("knockout", *DEMO, "--edge", "image->nowhere"), "'nowhere'.*question"),
    "half an edge": (("knockout", *DEMO, "--edge", "image"), "'image'.*source->target"),
    "half a box": (("knockout", *DEMO, "--box", "1,2,3"), "--box 1,2,3.*X0,Y0,X1,Y1"),
    "a weight below zero": (("knockout", *DEMO, "--factor", "-1"), "factor=-1.*at least 0"),
    "a missing table": (("knockout", "--dataset", "none.csv", "--images", "{folder}"), r"none\.csv.*CSV"),
    "a broken table": (("knockout", "--dataset", "{folder}/text.png", "--images", "{folder}"), f"{KINDS}.*CSV"),
    "a table without images": (("knockout", "--dataset", "{folder}/text.png"), "."),
    "words that are not there": (("trace", FACT, "-c", "the moon"), "'the moon'.*question"),
    "words of other length": (("trace", FACT, "-c", "the star", "--replace", "a b c"), "3 tokens.*'the star' 2"),
    "a layer out of range": (("edit", FACT, "-t", "Boris", "--layer", "99"), r"99.*0\.\.5"),
    "a layer that is no number": (("edit", FACT, "-t", "Boris", "--layer", "three"), "--layer three.*number"),
    "a position nowhere": (("edit", FACT, "-t", "Boris", "--layer", "3", "--position", "no"), "'no'.*question"),
    "no feature": (("sae", "steer", *DEMO), "no feature.*--feature 12=8"),
    "half a feature": (("sae", "steer", *DEMO, "--feature", "12"), "--feature 12.*N=VALUE"),
    "a feature that is not there": (("sae", "steer", *DEMO, "--feature", "99999=1"), "feature=99999"),
    "strengths in words": (("sae", "steer", *DEMO, "--feature", "1=1", "--strengths", "a,b"), "--strengths a,b.*0,1,2"),
    "an unknown mode": (("sae", "steer", *DEMO, "--feature", "1=1", "--mode", "push"), "--mode.*push.*clamp"),
    "a missing autoencoder": (("sae", "attribute", *DEMO, "--sae", "{folder}"), r"no sparse autoencoder.*cfg\.json"),
    "an unknown attribution": (("sae", "attribute", *DEMO, "--method", "lrp"), "--method.*lrp.*gradient"),
    "an output nowhere for features": (("sae", "attribute", *DEMO, "-o", "{folder}/no/x.html"), "--output.*folder"),
    "features to nowhere": (("sae", "train", "--out", "{folder}/no/sae"), "--out .*no/sae.*folder"),
    "a folder without questions": (("sae", "train", "--images", "{folder}"), "no questions.*--question"),
    "a folder without images": (
        ("sae", "train", "--images", "{folder}/none", "--question", "What?"),
        "holds no images",
    ),
    "a question without images": (("sae", "train", "--question", "What?"), "--question.*--images FOLDER"),
    "a table that is not there": (("sae", "train", "--dataset", "none.csv"), r"none\.csv.*CSV"),
    "an unknown kind": (("sae", "train", "--kind", "gated"), "--kind.*gated.*topk"),
    "an empty target": (("edit", FACT, "-t", ""), "target.*--target"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("bad")
    (path / "text.png").write_text("hello\n")
    return str(path)


@pytest.mark.parametrize("case", CASES)
def test_bad_input_gets_an_answer_that_says_what_to_do(case, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    typed, expected = CASES[case]
    result = run(*(word.replace("{folder}", folder) for word in typed))
    said = re.sub(r"[│\s]+", " ", result.stderr)
    assert result.exit_code in (1, 2)
    assert result.stdout == ""
    assert "Traceback" not in said
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert re.search(expected, said), said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command",
    ["ask", "explain", "patch", "knockout", "probability", "pope", "trace", "edit", "sae", "describe", "verify"],
)
def test_every_command_has_help_with_an_example(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"hooked-llava {command}" in result.stdout
