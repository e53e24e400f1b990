"""What `hooked-llava edit` asks besides the edited question: what was given, or the embedded world's own questions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from hooked_llava.cli.common import template_name

if TYPE_CHECKING:
    from hooked_llava.editing import Probe
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs

_SEEN_KINDS = ("fact_image", "fact_name", "query_color", "choose_attr", "query_pos", "exist", "name_shape")
_SEEN_EACH, _SEEN_SEED = 40, 7_000_003


@dataclass(frozen=True)
class Others:
    """Other questions, as they were given."""

    template: str
    keep: list[str] = field(default_factory=list)
    reword: list[str] = field(default_factory=list)
    ask: list[str] = field(default_factory=list)
    ask_text: list[str] = field(default_factory=list)


def about_the_image(
    model: HookedLLaVA, inputs: Inputs, questions: list[str], template: str, *, seen: bool = True
) -> Inputs:
    """Questions about the image that was given, or none."""
    images = [list(inputs.images)] * len(questions) if seen and inputs.images else None
    return model.prepare(questions, images, template=template_name(template))


def _of_the_world(model: HookedLLaVA, asked: list[Any]) -> Inputs:
    """Questions of the embedded world with their images."""
    images = [None if one.scene is None else one.scene.render() for one in asked]
    return model.prepare([one.question.text for one in asked], images)


def probes_of(
    model: HookedLLaVA, inputs: Inputs, question: str, target: str, others: Others, embedded: bool
) -> list[Probe]:
    """What else to ask: what was given, or the embedded world's own questions."""
    from hooked_llava.editing import Probe

    probes = []
    if others.reword:
        prompts = about_the_image(model, inputs, others.reword, others.template)
        probes.append(Probe("in other words", "generalisation", prompts, target))
    for name, questions, seen in (
        ("other questions", others.ask, True),
        ("other questions, without the image", others.ask_text, False),
        ("questions that were kept", others.keep, True),
    ):
        if questions:
            prompts = about_the_image(model, inputs, questions, others.template, seen=seen)
            probes.append(Probe(name, "specificity", prompts))
    given = others.reword or others.ask or others.ask_text
    return probes if given or not embedded else [*_world_probes(model, inputs, question, target), *probes]


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
