"""What explanations of features are worth on `tiny-shapes`, where the truth is known: `python -m benchmarks.features`.

Autoencoders of three seeds on what enters the language model at the image's positions. The explainer is the oracle of the
embedded world, so that what is measured is the scheme and the features, not a larger model's eyes. Features are explained on some
images and judged on others: how often an explanation is true of where the feature is active, how far region and phrase overlap,
which concepts have a feature of their own, and whether steering an explained feature makes the answer what the explanation says.
Intervals are 95% bootstrap intervals over seeds, or over features of all seeds, as said.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from benchmarks import sae as autoencoders
from benchmarks._feature_labels import COVERAGE, HOOK
from benchmarks._measure import arguments, markdown, start, write
from hooked_llava.features.explain import explain_features
from hooked_llava.features.explanations import Explanation
from hooked_llava.features.labels import match_labels
from hooked_llava.features.ranking import Pooling
from hooked_llava.features.scores import iou_of
from hooked_llava.features.store import FeatureStore
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.results.map_quality import bootstrap
from hooked_llava.sae.autoencoder import SparseAutoencoder
from hooked_llava.steering.sweep import STEERED, steering_sweep
from hooked_llava.toy.descriptions import Description
from hooked_llava.toy.evaluate import Example, held_out, prepare_examples
from hooked_llava.toy.feature_tables import HELD_OUT_SEED, PATCH_LABELS, feature_rows, patch_labels
from hooked_llava.toy.oracle import OracleExplainer, OracleSegmenter
from hooked_llava.toy.scenes import Scene, sample_scene

MODEL = "tiny-shapes"
RIGHT = 0.8
"""Share of held-out images that an explanation must be true of to be right."""
OWN = 0.8
"""F1 on held-out images from which on a concept has a feature of its own."""
FEWEST = 5
"""Held-out images in which a feature must be active for its explanation to be judged."""
ASKED = {"color": "query_color", "shape": "name_shape"}
"""Kinds of question by the word that answers them."""
_EXPLAINED_SEED, _JUDGED_SEED = 31, 32

Measured = dict[str, Any]


@dataclass(frozen=True)
class Scheme:
    """How features are shown to the explainer.

    Attributes:
        n_images (int): Images of each.
        by (Pooling): What ranks images.
        share (float): Share of its largest activation above which a feature counts as active.
    """

    n_images: int
    by: Pooling
    share: float


SCHEMES = {
    "the paper's: 5 images by mean, any activation": Scheme(5, "mean", 0.0),
    "5 images by maximum, above half the largest": Scheme(5, "max", 0.5),
    "20 images by maximum, above half the largest": Scheme(20, "max", 0.5),
}
STEERED_BY = list(SCHEMES)[-1]
"""The scheme whose explanations steer."""


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        images (int): Images that the autoencoders are trained on.
        steps (int): Steps of training.
        batch (int): Activations in a step.
        size (tuple[int, int]): Width and k.
        seeds (int): Seeds of the autoencoder.
        scenes (int): Images that features are explained on, and as many that explanations are judged on.
        judged (int): Top images of a feature that its explanation is judged on, at most.
        overlap (int): Of these, images whose overlap is measured.
        runs (int): Runs with as many random images.
        steered (int): Features for each kind of word, and for each seed, that are steered.
        prompts (int): Prompts for each of them.
        strengths (tuple[float, ...]): What the feature's largest activation is multiplied by.
    """

    images: int = 1600
    steps: int = 400
    batch: int = 1024
    size: tuple[int, int] = (128, 8)
    seeds: int = 3
    scenes: int = 200
    judged: int = 20
    overlap: int = 5
    runs: int = 3
    steered: int = 8
    prompts: int = 4
    strengths: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)


QUICK = Settings(8, 6, 64, (32, 4), 2, 8, 3, 2, 1, 1, 1, (1.0,))


@dataclass(frozen=True)
class Judged:
    """One seed's features, explained on some images, to be judged on others.

    Attributes:
        sae (SparseAutoencoder): The autoencoder.
        explained_on (FeatureStore): Where its features are active on the first images.
        judged_on (FeatureStore): The same on the others.
        scenes (tuple[list[Scene], list[Scene]]): What both show.
    """

    sae: SparseAutoencoder
    explained_on: FeatureStore
    judged_on: FeatureStore
    scenes: tuple[list[Scene], list[Scene]]

    def threshold(self, feature: int, scheme: Scheme) -> float:
        """Activation above which a feature counts as active."""
        return scheme.share * float(self.explained_on.largest[feature])

    def explanations(self, scheme: Scheme, features: Sequence[int]) -> list[Explanation]:
        """What the oracle says of some features."""
        oracle = OracleExplainer(self.scenes[0])
        how: dict[str, Any] = {"n_images": scheme.n_images, "by": scheme.by, "refine": False, "progress": False}
        found = []
        for feature in features:
            found += explain_features(
                self.explained_on, oracle, feature, threshold=self.threshold(feature, scheme), **how
            )
        return found

    def top(self, feature: int, scheme: Scheme, n: int) -> list[int]:
        """Held-out images in which a feature is above its threshold."""
        least = self.threshold(feature, scheme)
        tops = self.judged_on.top_images(feature, n, by=scheme.by)
        return [one.image for one in tops if scheme.share == 0 or one.score > least]

    def truth(self, phrase: str, feature: int, images: Sequence[int], scheme: Scheme) -> float:
        """The share of held-out images in which a phrase is true of where a feature is active."""
        least, said = self.threshold(feature, scheme), Description.parse(phrase)
        regions = [self.judged_on.mask(feature, i, least) for i in images]
        return float(np.mean([said.is_true_of(self.scenes[1][i], r) for i, r in zip(images, regions, strict=True)]))


def prepared(
    model: HookedLLaVA, settings: Settings, rows: Sequence[Any], seed: int, folder: str, scenes: tuple[Any, Any]
) -> Judged:
    """An autoencoder of one seed, and where its features are active on both sets of images."""
    how = autoencoders.Settings(images=settings.images, steps=settings.steps, batch=settings.batch)
    sae, _ = autoencoders.trained(model, rows, how, settings.size, seed, f"{folder}/stream")
    explained_on, judged_on = (
        FeatureStore.build(
            model,
            sae,
            [(scene.render(), "What is there?") for scene in of],
            f"{folder}/{name}-{seed}",
            batch_size=50,
            progress=False,
        )
        for name, of in zip(("explained", "judged"), scenes, strict=True)
    )
    return Judged(sae, explained_on, judged_on, scenes)


def judge(
    one: Judged, scheme: Scheme, settings: Settings, seed: int
) -> tuple[Measured, list[tuple[Explanation, float]]]:
    """How many features are explained, how many explanations are true elsewhere, and how region and phrase overlap."""
    alive = np.flatnonzero(one.explained_on.frequency).tolist()
    images = {feature: one.top(feature, scheme, settings.judged) for feature in alive}
    features = [feature for feature in alive if len(images[feature]) >= min(FEWEST, settings.judged)]
    found = [said for said in one.explanations(scheme, features) if said.found]
    rng = np.random.default_rng(seed)
    others = rng.permutation([said.phrase for said in found]).tolist()
    truth = [one.truth(said.phrase, said.feature, images[said.feature], scheme) for said in found]
    chance = [one.truth(p, said.feature, images[said.feature], scheme) for p, said in zip(others, found, strict=True)]
    segmenter = OracleSegmenter(one.scenes[1])

    def overlap(said: Explanation, of: Sequence[int]) -> float:
        return iou_of(one.judged_on, said, segmenter, of, one.threshold(said.feature, scheme))

    n = one.judged_on.n_images
    random_images = [
        [rng.choice(n, settings.overlap, replace=False).tolist() for _ in found] for _ in range(settings.runs)
    ]
    measured = {
        "features": len(features),
        "explained": len(found),
        "right": int(np.sum(np.array(truth) >= RIGHT)),
        "right_by_chance": int(np.sum(np.array(chance) >= RIGHT)),
        "iou": [overlap(said, images[said.feature][: settings.overlap]) for said in found],
        "iou_random": [[overlap(said, i) for said, i in zip(found, run, strict=True)] for run in random_images],
        "phrases": [said.phrase for said in found],
    }
    return measured, list(zip(found, truth, strict=True))


def concepts(one: Judged) -> Measured:
    """Of every concept the feature that tells it best on the first images, and how well it does on the others."""
    scores = [
        match_labels(store, [patch_labels(scene, store.layout(i)) for i, scene in enumerate(scenes)], PATCH_LABELS)
        for store, scenes in zip((one.explained_on, one.judged_on), one.scenes, strict=True)
    ]
    chosen = scores[0].f1.fillna(0).argmax("sae_feature")
    best = scores[1].isel(sae_feature=chosen)
    return {
        "feature": chosen.values.tolist(),
        "f1": best.f1.values.tolist(),
        "average_precision": best.average_precision.values.tolist(),
    }


def steering(
    model: HookedLLaVA,
    one: Judged,
    explanations: Sequence[tuple[Explanation, float]],
    examples: dict[str, list[Example]],
    settings: Settings,
    seed: int,
) -> list[Measured]:
    """Whether the answer becomes the word of the explanation, where right explanations have one, beside a random feature."""
    rng, found = np.random.default_rng(seed), []
    right = [(said, Description.parse(said.phrase).words) for said, truth in explanations if truth >= RIGHT]
    for kind in ASKED:
        with_word = [(said, words[kind]) for said, words in right if kind in words]
        for index in rng.permutation(len(with_word))[: settings.steered].tolist():
            said, word = with_word[index]
            asked = [example for example in examples[kind] if example.question.answer.lower() != word]
            value = {said.feature: float(one.explained_on.largest[said.feature])}
            curves = [
                _answered(model, one.sae, value, word, example, settings, seed) for example in asked[: settings.prompts]
            ]
            mean = {name: np.mean([curve[name] for curve in curves], axis=0).tolist() for name in curves[0]}
            found.append({"kind": kind, "word": word, "feature": said.feature, "phrase": said.phrase, **mean})
    return found


def _answered(
    model: HookedLLaVA,
    sae: SparseAutoencoder,
    value: dict[int, float],
    word: str,
    example: Example,
    settings: Settings,
    seed: int,
) -> dict[str, list[float]]:
    """Whether the answer is the word, by strength, steered and by a random feature at the same values."""
    inputs = prepare_examples(model, [example])
    assert example.scene is not None
    named = example.question.objects
    shown = example.scene.find(named[0]) if named else example.scene.objects[0]
    assert shown is not None
    at = list(inputs.token_map.mask_to_patches(shown.mask, coverage=COVERAGE))
    answer, controls = word.capitalize(), ["random_feature"]
    how: dict[str, Any] = {"sae": sae, "positions": at, "controls": controls, "seed": seed}
    sweep = steering_sweep(model, inputs, value, settings.strengths, answer=answer, **how)
    said = sweep.said.all("answer") if "answer" in sweep.said.dims else sweep.said
    return {
        str(name): said.sel(steered_by=name).astype(float).values.ravel().tolist() for name in sweep.steered_by.values
    }


def measure(settings: Settings) -> Measured:
    """Everything, for all seeds."""
    begin = time.perf_counter()
    model = HookedLLaVA.from_pretrained(MODEL)
    rows = feature_rows(settings.images)
    scenes = _scenes(_EXPLAINED_SEED, settings.scenes), _scenes(_JUDGED_SEED, settings.scenes)
    examples = {kind: held_out(question, 4 * settings.prompts, HELD_OUT_SEED) for kind, question in ASKED.items()}
    found: Measured = {"schemes": {name: [] for name in SCHEMES}, "concepts": [], "steering": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(settings.seeds):
            one = prepared(model, settings, rows, seed, folder, scenes)
            for name, scheme in SCHEMES.items():
                measured, explanations = judge(one, scheme, settings, seed)
                found["schemes"][name].append(measured)
                print(f"seed {seed}, {name}: {measured['right']} of {measured['explained']} right", flush=True)
                if name == STEERED_BY:
                    found["steering"] += steering(model, one, explanations, examples, settings, seed)
            found["concepts"].append(concepts(one))
    return found | {"seconds": round(time.perf_counter() - begin, 1)}


def _scenes(seed: int, n: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng) for _ in range(n)]


def interval(values: Any, digits: int = 2) -> str:
    """A mean with the ends of its interval; "-" of nothing."""
    values = np.asarray(values, dtype=np.float64)
    return autoencoders.interval(bootstrap(values), digits) if values.size else "-"


def schemes_table(report: Measured) -> str:
    """Explained and right by scheme (intervals over seeds), and overlap (over features)."""
    rows = {}
    for name, seeds in report["schemes"].items():

        def share(part: str, of: str, seeds: Sequence[Measured] = seeds) -> str:
            return interval([one[part] / one[of] for one in seeds if one[of]])

        iou = np.concatenate([one["iou"] for one in seeds])
        chance = [float(np.mean(run)) for one in seeds for run in one["iou_random"] if len(run)]
        shares = [share("explained", "features"), share("right", "explained"), share("right_by_chance", "explained")]
        rows[name] = [interval([one["features"] for one in seeds], 0), *shares, interval(iou), interval(chance, 3)]
    columns = ["features", "explained", "right", "right, of another feature", "IoU", "IoU, random images"]
    return markdown(columns, rows, "shown to the explainer")


def concepts_table(report: Measured) -> str:
    """By concept: the best feature on held-out images, in how many seeds it is its own, and how many explanations name it."""
    seeds, named = report["concepts"], report["schemes"][STEERED_BY]
    rows = {}
    for index, label in enumerate(PATCH_LABELS):
        f1 = [one["f1"][index] for one in seeds]
        precision = [one["average_precision"][index] for one in seeds]
        says = [sum(label in Description.parse(p).words.values() for p in one["phrases"]) for one in named]
        own = f"{sum(value >= OWN for value in f1)} of {len(f1)}"
        rows[label] = [interval(f1), interval(precision), own, interval(says, 1)]
    return markdown(
        ["F1", "average precision", f"F1 of {OWN:g} or more, seeds", "explanations that say it"], rows, "concept"
    )


def steering_table(report: Measured) -> str:
    """How often the answer is the explanation's word, over features of all seeds."""
    strengths = report["settings"]["strengths"]
    rows = {}
    for kind in ASKED:
        features = [one for one in report["steering"] if one["kind"] == kind]
        for way, called in ((STEERED, "explained"), ("random_feature", "random")):
            cells = [interval([one[way][i] for one in features]) for i in range(len(strengths))]
            rows[f"{kind}, {called} feature"] = [str(len(features)), *cells]
    return markdown(["features", *(f"strength {s:g}" for s in strengths)], rows, "answer is the word")


def tables(report: Measured) -> list[str]:
    """All tables, in the order of the page."""
    makers: tuple[Callable[[Measured], str], ...] = (schemes_table, concepts_table, steering_table)
    return [made(report) for made in makers]


def main(argv: list[str] | None = None) -> None:
    options = start(arguments(__doc__), argv)
    settings = QUICK if options.quick else Settings()
    report = measure(settings) | {"settings": asdict(settings)}
    print("\n\n".join(tables(report)))
    write("features", options, hook=HOOK, model=MODEL, labels=PATCH_LABELS, **report)


if __name__ == "__main__":
    main()
