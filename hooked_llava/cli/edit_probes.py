"""What `hooked-llava edit` asks besides the edited question: what was given, or the embedded world's own questions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from hooked_llava.cli.common import PromptOptions

if TYPE_CHECKING:
    from hooked_llava.editing import Probe
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.toy.evaluate import Example

_SEEN_KINDS = ("fact_image", "fact_name", "query_color", "choose_attr", "query_pos", "exist", "name_shape")
_SEEN_EACH, _SEEN_SEED = 40, 7_000_003

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
    if others.reword or others.ask or others.ask_text or not prompt.is_embedded:
        return probes
    return [*_world_probes(model, inputs, prompt.question, target), *probes]


def _of_the_world(model: HookedLLaVA, asked: Sequence[Example]) -> Inputs:
    """Questions of the embedded world with their images."""
    images = [None if one.scene is None else one.scene.render() for one in asked]
    return model.prepare([one.question.text for one in asked], images)


def _world_probes(model: HookedLLaVA, inputs: Inputs, question: str, target: str) -> list[Probe]:
    """The embedded world's questions around a fact; none if the question does not ask for one."""
    from hooked_llava.editing import Probe
    from hooked_llava.toy.edit_tables import edit_table

    fact = _fact(model, inputs, question)
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
        probes.append(Probe(rows.name, rows.role, _of_the_world(model, asked), expected))
    return probes


def _fact(model: HookedLLaVA, inputs: Inputs, question: str) -> tuple[str, str] | None:
    """Which fact of the embedded world is asked for, as relation and shape; the shape of an image as the model sees it."""
    from hooked_llava.toy.edit_tables import THIS
    from hooked_llava.toy.facts import RELATIONS
    from hooked_llava.toy.scenes import SHAPES

    said = {f"the {shape}": shape for shape in SHAPES}
    if inputs.images and len(inputs.images) == 1 and THIS in question:
        said[THIS] = model.generate(model.prepare("What shape is this?", inputs.images[0])).lower()
    for relation in RELATIONS:
        for subject, shape in said.items():
            if question in {wording.format(subject=subject) for wording in relation.templates}:
                return relation.name, shape
    return None


def world_questions(model: HookedLLaVA) -> Iterator[Inputs]:
    """Held-out questions of the embedded world, batch by batch, for what keys usually look like."""
    from hooked_llava.toy.evaluate import held_out

    return (_of_the_world(model, held_out(kind, _SEEN_EACH, _SEEN_SEED)) for kind in _SEEN_KINDS)
