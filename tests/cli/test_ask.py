from __future__ import annotations

import pytest

from hooked_llava.model.llava import HookedLLaVA
from tests.cli.running import QUESTION, run


def test_ask_prints_question_answer_and_tokens(checkpoint, image):
    result = run("ask", image, QUESTION, "-m", checkpoint, "--max-new-tokens", "3", "--top", "4")
    assert result.exit_code == 0, result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    model = HookedLLaVA.from_pretrained(checkpoint)
    inputs = model.prepare(QUESTION, image)
    assert lines[0] == QUESTION
    assert lines[1] == (model.generate(inputs, max_new_tokens=3) or "(nothing)")
    assert lines[3].split() == ["first", "token", "probability"]
    probabilities = [float(line.split()[1]) for line in lines[4:8]]
    assert probabilities == sorted(probabilities, reverse=True)
    best = model(inputs)[0, -1].softmax(-1).max().detach()
    assert probabilities[0] == pytest.approx(float(best), abs=6e-4)
