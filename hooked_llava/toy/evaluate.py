"""Accuracy of `tiny-shapes` on new images: `python -m hooked_llava.toy.evaluate [--checkpoint DIR ...]`.

Everything goes through the shipped files and plain Hugging Face classes: the prompt in words, the processor, the model,
and the most probable token of the whole vocabulary at the last position.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import (
    AutoConfig,
    AutoProcessor,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.toy.alignment import ToyModel
from hooked_llava.toy.questions import ANSWER_KINDS, TEXT_KINDS, Question, format_prompt
from hooked_llava.toy.scenes import Scene
from hooked_llava.toy.wide_questions import WIDE_KINDS
from hooked_llava.toy.worlds import WORLDS

CHECKPOINTS = Path(__file__).parent / "checkpoint"
FACT_WITH_IMAGE = "fact_name, with an image"
EVALUATED = {
    "tiny-shapes": (*ANSWER_KINDS, FACT_WITH_IMAGE),
    "tiny-shapes-next": (*ANSWER_KINDS, FACT_WITH_IMAGE, *WIDE_KINDS),
}
"""Kinds of question by world. A kind's place decides which questions of it are drawn."""
_SEED = 1_000_003  # training draws from (seed, step) with small seeds
_ONE_SHAPE_KINDS = ("fact_image", "name_shape")
_USUAL_KINDS = ("fact_image", "fact_name", "query_color", "choose_attr", "query_pos", "exist", "name_shape")
_USUAL_EACH, _USUAL_SEED = 40, 7_000_003


@dataclass(frozen=True)
class Example:
    """A question and the image it is asked with; `scene` is None when it is asked without one."""

    question: Question
    scene: Scene | None

    @property
    def prompt(self) -> str:
        """The prompt, with `<image>` where the image goes."""
        return format_prompt(self.question, image=self.scene is not None)


@dataclass(frozen=True)
class KindAccuracy:
    """How often the first token was right; `commonest` is what always giving the most frequent answer would reach."""

    accuracy: float
    n: int
    commonest: float


def held_out(kind: str, n: int, seed: int = _SEED, *, world: str = "tiny-shapes") -> list[Example]:
    """n questions of one kind (of `EVALUATED[world]`), each about an image of its own, of one shape for "this shape"."""
    kinds, drawn_from = EVALUATED[world], WORLDS[world]
    if kind not in kinds:
        raise ValueError(f"kind must be one of {', '.join(kinds)}; got {kind!r}")
    rng = np.random.default_rng([seed, kinds.index(kind)])
    asked = "fact_name" if kind == FACT_WITH_IMAGE else kind
    examples: list[Example] = []
    while len(examples) < n:
        scene = drawn_from.sample(rng, 1 if kind in _ONE_SHAPE_KINDS else None, drawn_from.max_objects)
        question = drawn_from.ask(asked, scene, rng)
        if question is not None:
            examples.append(Example(question, None if kind in TEXT_KINDS else scene))
    return examples


def usual_questions() -> Iterator[list[Example]]:
    """Held-out questions of many kinds, a batch for each kind: for what keys of an MLP usually look like.

    >>> sum(map(len, usual_questions()))
    280
    """
    return (held_out(kind, _USUAL_EACH, _USUAL_SEED) for kind in _USUAL_KINDS)


def prepare_examples(model: HookedLLaVA, examples: Sequence[Example]) -> Inputs:
    """Questions with their images, as `model.prepare` makes prompts of them."""
    images = [None if one.scene is None else one.scene.render() for one in examples]
    return model.prepare([one.question.text for one in examples], images)


@torch.no_grad()
def predict(
    model: ToyModel, processor: LlavaProcessor | LlavaNextProcessor, examples: Sequence[Example], batch_size: int = 32
) -> list[str]:
    """The first token the model answers each example with; examples must all have an image or all have none."""
    answers: list[str] = []
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        images = [e.scene.render() for e in batch if e.scene is not None] or None
        inputs = processor(
            images=images,
            text=[e.prompt for e in batch],
            text_kwargs={"padding": True, "return_tensors": "pt"},
            images_kwargs={"return_tensors": "pt"},
        )
        logits = model(**inputs.to(model.device), logits_to_keep=1).logits[:, -1]
        answers += processor.tokenizer.convert_ids_to_tokens(logits.argmax(-1).tolist())
    return answers


def evaluate(
    model: ToyModel,
    processor: LlavaProcessor | LlavaNextProcessor,
    *,
    n: int = 500,
    seed: int = _SEED,
    kinds: Sequence[str] | None = None,
    world: str = "tiny-shapes",
) -> dict[str, KindAccuracy]:
    """Held-out accuracy by kind of question (all of them by default), from n questions each."""
    results = {}
    for kind in tqdm(EVALUATED[world] if kinds is None else kinds, desc="kinds", leave=False):
        examples = held_out(kind, n, seed, world=world)
        truth = [e.question.answer for e in examples]
        right = sum(a == b for a, b in zip(predict(model, processor, examples), truth, strict=True))
        results[kind] = KindAccuracy(right / n, n, Counter(truth).most_common(1)[0][1] / n)
    return results


def evaluate_checkpoint(folder: Path, *, n: int = 500, seed: int = _SEED) -> dict[str, KindAccuracy]:
    """`evaluate` on a checkpoint folder, in the world that its class belongs to."""
    tiled = AutoConfig.from_pretrained(folder).model_type == "llava_next"
    loader = LlavaNextForConditionalGeneration if tiled else LlavaForConditionalGeneration
    model = loader.from_pretrained(folder, dtype=torch.float32).eval()
    world = "tiny-shapes-next" if tiled else "tiny-shapes"
    return evaluate(model, AutoProcessor.from_pretrained(folder), n=n, seed=seed, world=world)


def markdown_table(results: dict[str, dict[str, KindAccuracy]]) -> str:
    """A table with a row per kind and a column per checkpoint, given results by checkpoint name."""
    names = list(results)
    lines = ["| question | always the commonest answer | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for kind, first in results[names[0]].items():
        cells = " | ".join(f"{results[name][kind].accuracy:.3f}" for name in names)
        lines.append(f"| {kind} | {first.commonest:.2f} | {cells} |")
    return "\n".join(lines)


def embedded() -> list[Path]:
    """The checkpoint folders that come with the package, one for each training seed."""
    return sorted(folder for folder in CHECKPOINTS.glob("seed*") if folder.is_dir())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Held-out accuracy of tiny-shapes by kind of question, as a markdown table."
    )
    parser.add_argument(
        "--checkpoint",
        type=Path,
        nargs="+",
        default=embedded(),
        help="one or several folders; all that are shipped by default",
    )
    parser.add_argument("--n", type=int, default=500, help="questions per kind")
    parser.add_argument("--seed", type=int, default=_SEED)
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    folders = {folder.name if folder.parent == CHECKPOINTS else str(folder): folder for folder in arguments.checkpoint}
    results = {name: evaluate_checkpoint(f, n=arguments.n, seed=arguments.seed) for name, f in folders.items()}
    sys.stdout.write(markdown_table(results) + "\n")


if __name__ == "__main__":
    main()
