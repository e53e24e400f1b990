"""Pages of explained features: the card of one, and a gallery of some hundred to browse and to search in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import xarray as xr

from hooked_llava.architecture.layout import ALL
from hooked_llava.errors import InputError, counted
from hooked_llava.features.effects import CONTROL
from hooked_llava.features.explain import lit_images
from hooked_llava.features.explanations import Explanation
from hooked_llava.features.scores import chance, score_table
from hooked_llava.features.store import FeatureStore
from hooked_llava.options.feature_scores import FEATURE_SCORES
from hooked_llava.viz.figures.activations import activation_histogram
from hooked_llava.viz.pages.embed import is_small, thumbnail
from hooked_llava.viz.pages.features import FeaturePage
from hooked_llava.viz.pages.page import made_with, make_page
from hooked_llava.viz.pages.vectors import BARS_HEIGHT, BARS_WIDTH, bars_path, outside_path

_BINS = 20
_NOT_EXPLAINED = "not explained"


@dataclass(frozen=True)
class _Shown:
    """What the pages of a store have in common.

    Attributes:
        store (FeatureStore): The features and their images.
        threshold (float): Activation above which a cell is lit.
        grid (str): Whose cells.
        effects (Mapping[str, xr.Dataset | None]): Scores, words and steered, as far as they were measured.
        thumbnails (dict[str, int]): The number of each image on the page, by its hash.
        images (list[dict[str, Any]]): The images, each once.
    """

    store: FeatureStore
    threshold: float
    grid: str
    effects: Mapping[str, xr.Dataset | None]
    thumbnails: dict[str, int] = field(default_factory=dict)
    images: list[dict[str, Any]] = field(default_factory=list)

    def card(self, one: Explanation) -> dict[str, Any]:
        """Everything that is known of one feature, for a template."""
        store, feature = self.store, one.feature
        shown = {
            "feature": feature,
            "phrase": one.phrase or _NOT_EXPLAINED,
            "found": one.found,
            "text": one.text,
            "concept": one.concept or "",
            "frequency": float(store.frequency[feature]),
            "largest": float(store.largest[feature]),
            "scores": _scores_of(self.effects["scores"], feature),
            "words": _words_of(self.effects["words"], feature),
            **_steered_of(self.effects["steered"], feature),
        }
        said = [shown["phrase"], one.text, one.concept or "", *(word["word"] for word in shown["words"])]
        said += [text for row in shown["steering"] if row["changed"] for text in (row["before"], row["after"])]
        return shown | {"search": " ".join([str(feature), *said]).lower()}

    def thumbnail(self, image: int, longest: int) -> int:
        """The number of an image on the page, where it is put once."""
        found = self.store.record(image).hash
        if found not in self.thumbnails:
            drawn = self.store.image(image)
            self.thumbnails[found] = len(self.images)
            size = {"width": drawn.width, "height": drawn.height, "squares": is_small(drawn)}
            self.images.append({"src": thumbnail(drawn, longest), **size})
        return self.thumbnails[found]

    def lit(self, one: Explanation, longest: int) -> list[dict[str, Any]]:
        """The images of an explanation, each with what is to be darkened."""
        found = []
        for image in one.images:
            number = self.thumbnail(image, longest)
            outside = outside_path(self.store.mask(one.feature, image, self.threshold, grid=self.grid))
            sizes = {name: self.images[number][name] for name in ("width", "height")}
            found.append({"image": image, "number": number, "outside": outside, **sizes})
        return found

    def footer(self) -> dict[str, str]:
        """Of what the features are."""
        store = self.store
        return {
            "Model": f"{store.about.get('model') or 'unnamed'}, {store.hook}",
            "Features": f"{store.n_features} of a sparse autoencoder, at tokens of {store.tokens!r}",
            "Images": f"{counted(store.n_images, 'image')}, {counted(store.n_entries, 'activation')} stored",
            "Made": made_with(),
        }


def gallery_page(
    store: FeatureStore,
    explanations: Sequence[Explanation],
    scores: xr.Dataset | None = None,
    *,
    words: xr.Dataset | None = None,
    steered: xr.Dataset | None = None,
    threshold: float = 0.0,
    grid: str = ALL,
    longest: int = 128,
    title: str | None = None,
) -> FeaturePage:
    """Some hundred explained features in one HTML file, to browse, to search and to sort; nothing is measured here.

    Args:
        store: the features and their images.
        explanations: what `explain_features` gave, in the order in which they are shown.
        scores: what `score_features` gave for them.
        words: what `written_words` gave.
        steered: what `steered_answers` gave.
        threshold: activation above which a cell is lit.
        grid: whose cells.
        longest: pixels of a thumbnail's longer side. Every image stands once in the file, however many features show it.
        title: the page's heading; by default how many features there are.

    Raises `InputError` without explanations, and as `store.image`.

    >>> import tempfile
    >>> from hooked_llava.model.llava import HookedLLaVA
    >>> from hooked_llava.sae.files import load_sae
    >>> from hooked_llava.toy.images import image_path
    >>> model, sae = HookedLLaVA.from_pretrained("tiny-shapes"), load_sae("tiny-shapes")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.build(model, sae, [(image_path("demo"), "What is there?")], folder, progress=False)
    ...     page = gallery_page(store, [Explanation(60, (0,), "green shapes", "green", "color")])
    >>> page.question
    '1 feature of tiny-shapes, 1 explained'
    """
    if not explanations:
        raise InputError("explanations=[] shows nothing; give what explain_features returned, one or more.")
    parts = _Shown(store, threshold, grid, {"scores": scores, "words": words, "steered": steered})
    cards = [parts.card(one) | {"images": parts.lit(one, longest), "bars": _bars(store, one)} for one in explanations]
    n_found = sum(one.found for one in explanations)
    heading = f"{counted(len(cards), 'feature')} of {store.about.get('model') or 'a model'}, {n_found} explained"
    table = [] if scores is None else _by_concept(scores)
    shown = {
        "hook": store.hook,
        "cards": cards,
        "images": parts.images,
        "bars_size": (BARS_WIDTH, BARS_HEIGHT),
        "concepts": sorted({card["concept"] for card in cards if card["concept"]}),
        "measured": {} if scores is None else _measured(scores),
        "table": table,
        "total": table[-1]["cells"] if table else [],
        "steered_counts": None if steered is None else _steered_counts(cards),
    }
    results = {"scores": scores, "words": words, "steered": steered, "explanations": list(explanations)}
    said = {"question": title or heading, "answer": ""}
    return make_page(FeaturePage, "gallery", shown, parts.footer(), results, **said)


def feature_page(
    store: FeatureStore,
    explanation: Explanation,
    scores: xr.Dataset | None = None,
    *,
    words: xr.Dataset | None = None,
    steered: xr.Dataset | None = None,
    threshold: float = 0.0,
    grid: str = ALL,
) -> FeaturePage:
    """The card of one feature as a page: where it is active, how strongly, what it means, what it writes and what it changes.

    The arguments are those of `gallery_page`, for one explanation. Raises as that.

    >>> import tempfile
    >>> from hooked_llava.model.llava import HookedLLaVA
    >>> from hooked_llava.sae.files import load_sae
    >>> from hooked_llava.toy.images import image_path
    >>> model, sae = HookedLLaVA.from_pretrained("tiny-shapes"), load_sae("tiny-shapes")
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     store = FeatureStore.build(model, sae, [(image_path("demo"), "What is there?")], folder, progress=False)
    ...     page = feature_page(store, Explanation(60, (0,), "green shapes", "green", "color"))
    >>> page.question, page.answer
    ('Feature 60', 'green')
    """
    parts = _Shown(store, threshold, grid, {"scores": scores, "words": words, "steered": steered})
    card = parts.card(explanation)
    lit = lit_images(store, explanation.feature, explanation.images, threshold, grid=grid)
    shown = {
        "hook": store.hook,
        "model_name": store.about.get("model") or "the model",
        "card": card,
        "lit": list(zip(explanation.images, lit, strict=True)),
        "histogram": activation_histogram(store, explanation.feature, title=""),
        "measured": {} if scores is None else _measured(scores),
    }
    results = {"scores": scores, "words": words, "steered": steered, "explanations": [explanation]}
    said = {"question": f"Feature {explanation.feature}", "answer": card["phrase"]}
    return make_page(FeaturePage, "feature", shown, parts.footer(), results, **said)


def _bars(store: FeatureStore, one: Explanation) -> str:
    return bars_path(store.histogram(one.feature, _BINS)[0])


def _measured(scores: xr.Dataset) -> dict[str, Any]:
    """The scores that there are, by name, in the order of the registry."""
    return {name: score for name, score in FEATURE_SCORES.items() if name in scores}


def _scores_of(scores: xr.Dataset | None, feature: int) -> list[dict[str, Any]]:
    """A feature's scores, each with the mean of its random runs."""
    if scores is None or feature not in scores.feature:
        return []
    one = scores.sel(feature=feature)
    return [
        {
            "name": name,
            "title": score.title,
            "value": float(one[name]),
            "chance": None if (by_chance := chance(one, name)) is None else float(by_chance),
        }
        for name, score in _measured(scores).items()
        if not bool(one[name].isnull())
    ]


def _words_of(words: xr.Dataset | None, feature: int) -> list[dict[str, Any]]:
    if words is None or feature not in words.feature:
        return []
    one = words.sel(feature=feature)
    rows = zip(one.word.values.tolist(), one.probability.values.tolist(), strict=True)
    return [{"word": word, "probability": probability} for word, probability in rows]


def _steered_of(steered: xr.Dataset | None, feature: int) -> dict[str, Any]:
    """The answers with the feature set, question by question, and the value that it was set to."""
    if steered is None or feature not in steered.feature:
        return {"steering": [], "value": None}
    one = steered.sel(feature=feature)
    columns = (one.question, one.unsteered, one.steered, one[CONTROL])
    rows = [
        {"question": question, "before": before, "after": after, "random": control, "changed": after != before}
        for question, before, after, control in zip(*(column.values.tolist() for column in columns), strict=True)
    ]
    return {"steering": rows, "value": float(one.value)}


def _steered_counts(cards: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """At how many features some answer is another."""
    asked = [card["steering"] for card in cards if card["steering"]]
    return {
        "n": len(asked),
        "changed": sum(any(row["changed"] for row in rows) for rows in asked),
        "random": sum(any(row["random"] != row["before"] for row in rows) for rows in asked),
    }


def _by_concept(scores: xr.Dataset) -> list[dict[str, Any]]:
    """The rows of `score_table`: for each concept the mean of each score with its interval, and of its random runs."""
    table = score_table(scores)

    def cell(concept: str, name: str) -> dict[str, float]:
        return {part: float(table[part].sel(concept=concept, score=name)) for part in ("mean", "low", "high")}

    rows = []
    for concept, n in zip(table.concept.values.tolist(), table.n.values.tolist(), strict=True):
        cells = [
            {
                **cell(concept, name),
                "title": score.title,
                "chance": cell(concept, f"{name}_random")["mean"] if f"{name}_random" in scores else None,
            }
            for name, score in _measured(scores).items()
        ]
        rows.append({"concept": concept, "n": n, "cells": cells})
    return rows
