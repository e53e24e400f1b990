"""Have a larger model say what features stand for, from the images in which they are most active (Zhang et al. 2411.14982)."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any, SupportsFloat, get_args

import numpy as np
from PIL import Image

from hooked_llava.architecture.layout import ALL
from hooked_llava.checks import Indices, as_indices, finite_number, one_of, whole_number
from hooked_llava.errors import InputError
from hooked_llava.features.asking import Explainer, concurrency_of, each_answered
from hooked_llava.features.explanations import Explanation, ExplanationFile
from hooked_llava.features.lit_images import lit_image
from hooked_llava.features.prompts import (
    CONCEPT_PROMPT,
    EXPLAIN_PROMPT,
    REFINE_PROMPT,
    filled,
    is_unable,
    read_answer_phrase,
    read_concept,
    read_explanation,
)
from hooked_llava.features.ranking import Pooling
from hooked_llava.features.store import FeatureStore
from hooked_llava.options.explainers import DIMMED
from hooked_llava.replay.progress import progress_bar

_Job = tuple[int, tuple[int, ...], list[Image.Image]]


def explain_features(
    store: FeatureStore,
    explainer: Explainer,
    features: Indices | None = None,
    *,
    n_images: int = 5,
    by: Pooling = "mean",
    grid: str = ALL,
    threshold: SupportsFloat = 0.0,
    dimmed: SupportsFloat = DIMMED,
    prompt: str = EXPLAIN_PROMPT,
    refine: Explainer | bool = True,
    label: Explainer | bool = True,
    out: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Explanation]:
    """What each feature stands for, in words, by an explainer that is shown where it is most active.

    The scheme of Zhang et al. (2411.14982, section 3.2): the top images, blended to black where the feature is not active, in one
    prompt; of the reply a noun phrase, and of that a concept, by prompts without images.

    Args:
        store: the features and their images.
        explainer: any callable (images, prompt) -> text. If it has an attribute `concurrency`, so many threads call it.
        features: which; by default all that are active somewhere. One that is active in no image is not asked about.
        n_images: how many images each is shown by, at most; none of them twice.
        by: "mean" over an image's cells, or their "max".
        grid: whose cells; the paper's is "base".
        threshold: activation above which a cell counts as active; the paper's is 1e-5.
        dimmed: how far the rest is blended to black, 0 to 1.
        prompt: what is asked about the images. The explanation is what the reply has after "[EXPLANATION]:".
        refine: what makes a noun phrase of it: the same explainer, another one, or (False) nothing: it is taken as it is, and
            so is a reply without "[ANSWER]".
        label: what names the concept, likewise; False leaves it out.
        out: a JSON file for the explanations, written whole every few seconds; the same call asks only for what it lacks.
        progress: show a progress bar.

    Returns an explanation for each feature, in their order. Raises `InputError` for features out of range, and for a file of
    explanations made otherwise. An error of the explainer stops the rest; what was answered is kept in the file.
    """
    scheme = _Scheme(n_images, by, grid, threshold, dimmed, prompt, explainer, refine, label)
    chosen = np.flatnonzero(store.frequency) if features is None else features
    numbers = list(dict.fromkeys(as_indices(chosen, store.n_features, "features", empty=features is None)))
    with ExplanationFile(out, {**_origin(store), **scheme.about}) as file:
        left = [feature for feature in numbers if feature not in file.explanations]
        with progress_bar(len(left), "feature", shown=progress, desc="explaining") as bar:
            for _, explanation in each_answered(scheme.jobs(store, left), scheme.answer, scheme.concurrency):
                file.add(explanation)
                bar.update()
        return file.among(numbers)


class _Scheme:
    """How explanations are asked for; checked when it is made."""

    def __init__(
        self,
        n_images: int,
        by: Pooling,
        grid: str,
        threshold: SupportsFloat,
        dimmed: SupportsFloat,
        prompt: str,
        explainer: Explainer,
        refine: Explainer | bool,
        label: Explainer | bool,
    ) -> None:
        self.n_images = whole_number(n_images, "n_images", least=1)
        one_of(by, get_args(Pooling), "by")
        self.by: Pooling = by
        self.grid, self.prompt = grid, prompt
        self.threshold = finite_number(threshold, "threshold", least=0.0)
        self.dimmed = finite_number(dimmed, "dimmed", least=0.0)
        if not callable(explainer):
            raise InputError(f"explainer={explainer!r}; expected a callable of images and a prompt that returns text.")
        self.explainer = explainer
        self.refiner, self.labeller = _asked("refine", refine, explainer), _asked("label", label, explainer)

    @property
    def concurrency(self) -> int:
        return concurrency_of(self.explainer, self.refiner, self.labeller)

    @property
    def about(self) -> dict[str, Any]:
        """What makes explanations differ, for their file."""
        names = ("n_images", "by", "grid", "threshold", "dimmed")
        further = {"refine": self.refiner is not None, "label": self.labeller is not None}
        digest = sha256(self.prompt.encode()).hexdigest()[:16]
        return {**{name: getattr(self, name) for name in names}, **further, "prompt": digest}

    def jobs(self, store: FeatureStore, features: Sequence[int]) -> Iterator[_Job]:
        for feature in features:
            images = tuple(one.image for one in store.top_images(feature, self.n_images, by=self.by, grid=self.grid))
            lit = lit_images(store, feature, images, self.threshold, grid=self.grid, dimmed=self.dimmed)
            yield feature, images, lit

    def answer(self, job: _Job) -> Explanation:
        feature, images, lit = job
        if not images:
            return Explanation(feature, images)
        return _explained(feature, images, self.explainer(lit, self.prompt), self.refiner, self.labeller)


def lit_images(
    store: FeatureStore,
    feature: int,
    images: Sequence[int],
    threshold: SupportsFloat = 0.0,
    *,
    grid: str = ALL,
    dimmed: SupportsFloat = DIMMED,
) -> list[Image.Image]:
    """Images of a store, blended to black where a feature is not above a threshold: what an explainer is shown.

    >>> import tempfile
    >>> from hooked_llava.model.llava import HookedLLaVA
    >>> from hooked_llava.sae import load_sae
    >>> from hooked_llava.toy.images import image_path
    >>> model, sae = HookedLLaVA.from_pretrained("tiny-shapes"), load_sae("tiny-shapes")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.build(model, sae, [(image_path("demo"), "What is there?")], folder, progress=False)
    ...     lit_images(store, store.of_image(0, n=1)[0].feature, [0])[0].size
    (64, 64)
    """
    return [
        lit_image(store.image(i), store.mask(feature, i, float(threshold), grid=grid), dimmed=dimmed) for i in images
    ]


def _explained(
    feature: int, images: tuple[int, ...], reply: str, refiner: Explainer | None, labeller: Explainer | None
) -> Explanation:
    """What a reply says, as a noun phrase and a concept."""
    text = read_explanation(reply)
    if not text or is_unable(text):
        return Explanation(feature, images, text, reply=reply)
    phrase, concept = text, None
    if refiner is not None:
        refined = refiner([], filled(REFINE_PROMPT, text))
        phrase = read_answer_phrase(refined) or ("" if is_unable(refined) else text)
    if labeller is not None and phrase:
        concept = read_concept(labeller([], filled(CONCEPT_PROMPT, phrase)))
    return Explanation(feature, images, text, phrase, concept, reply)


def _asked(name: str, given: Explainer | bool, explainer: Explainer) -> Explainer | None:
    """The explainer for a further question: the same, another, or none."""
    if isinstance(given, bool):
        return explainer if given else None
    if not callable(given):
        raise InputError(f"{name}={given!r}; expected True, False, or a callable of images and a prompt.")
    return given


def _origin(store: FeatureStore) -> dict[str, Any]:
    """Of which features and images, so that a file is not continued with others."""
    keys = ("model", "hook", "sae", "n_features", "tokens", "first_prompt", "n_rows")
    return {key: store.about[key] for key in keys if key in store.about}
