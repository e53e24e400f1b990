"""What `hooked-llava edit` asks besides the edited question: what was given, or the embedded world's own questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.common import PromptOptions

if TYPE_CHECKING:
    from hooked_llava.editing import Probe
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

Keep = Annotated[
    list[str] | None,
    typer.Option(metavar="QUESTION", help="Compute the update so that it leaves this question alone; may be repeated."),
]
Reword = Annotated[
    list[str] | None,
    typer.Option(
        metavar="QUESTION", help="The same in other words, to be answered by the target too; may be repeated."
    ),
]
Ask = Annotated[
    list[str] | None,
    typer.Option(
        metavar="QUESTION",
        help="Another question about the image, whose answer is to stay; may be repeated. Default: in the embedded "
        "models other images, words, shapes, relations and colors, if the question is one of their facts.",
    ),
]
AskText = Annotated[
    list[str] | None, typer.Option(metavar="QUESTION", help="The same without the image; may be repeated.")
]


@dataclass(frozen=True, kw_only=True)
class OtherQuestions:
    """Other questions, as they were given."""

    keep: Keep = None
    reword: Reword = None
    ask: Ask = None
    ask_text: AskText = None


def about_the_image(
    model: HookedLLaVA, inputs: Inputs, questions: Sequence[str], template: str | None, *, seen: bool = True
) -> Inputs:
    """Questions about the image that was given, or none."""
    images = [list(inputs.images)] * len(questions) if seen and inputs.images else None
    return model.prepare(list(questions), images, template=template)


def probes_of(
    model: HookedLLaVA, inputs: Inputs, prompt: PromptOptions, target: str, others: OtherQuestions
) -> list[Probe]:
    """What else to ask: what was given, or the embedded world's own questions."""
    from hooked_llava.editing import Probe

    probes = []
    for name, questions, seen in (
        ("in other words", others.reword, True),
        ("other questions", others.ask, True),
        ("other questions, without the image", others.ask_text, False),
        ("questions that were kept", others.keep, True),
    ):
        if questions:
            prompts = about_the_image(model, inputs, questions, prompt.template_name, seen=seen)
            reworded = questions is others.reword
            role, expected = ("generalisation", target) if reworded else ("specificity", None)
            probes.append(Probe(name, role, prompts, expected))
    if others.reword or others.ask or others.ask_text or not prompt.is_tiny_shapes:
        return probes
    return [*_world_probes(model, inputs, prompt.question, target), *probes]


def _world_probes(model: HookedLLaVA, inputs: Inputs, question: str, target: str) -> list[Probe]:
    """The embedded world's questions around a fact; none if the question does not ask for one."""
    from hooked_llava.editing import Probe
    from hooked_llava.toy.edit_tables import THIS, edit_table, fact_asked
    from hooked_llava.toy.evaluate import prepare_examples

    seen = inputs.images[0] if inputs.images and len(inputs.images) == 1 and THIS in question else None
    shape = None if seen is None else model.generate(model.prepare("What shape is this?", seen)).lower()
    fact = fact_asked(question, shape)
    table = edit_table()
    case = next((case for case in table.cases if (case.relation, case.shape) == fact), None)
    probes = []
    for rows in () if case is None else case.probes:
        pool = table.images if rows.pool == "images" else table.words
        asked = [pool[row] for row in rows.rows]
        if rows.pool == "words" and not inputs.n_images:
            asked = [one for one in asked if one.question.text != question]
        if rows.role == "efficacy" or not asked:
            continue
        expected = target if rows.role == "generalisation" else [one.question.answer for one in asked]
        probes.append(Probe(rows.name, rows.role, prepare_examples(model, asked), expected))
    return probes
