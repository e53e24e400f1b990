"""`hooked-llava sae explain`: what the features of an autoencoder mean, from images to a page to browse."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from hooked_llava.cli.command import command
from hooked_llava.cli.common import ModelOptions, chosen_device, open_image
from hooked_llava.cli.options import MaxNewTokens, at_least
from hooked_llava.cli.sae_explainers import ExplainerOptions, Judges
from hooked_llava.cli.sae_options import SAEOptions
from hooked_llava.cli.sae_train import EMBEDDED_WORLD, DataOptions
from hooked_llava.cli.terminal import busy, escape, needs_figures, say, say_where, show_table
from hooked_llava.errors import InputError, counted

if TYPE_CHECKING:
    import xarray as xr

    from hooked_llava.datasets import StudyRow
    from hooked_llava.features import Explanation, FeatureStore
    from hooked_llava.model.llava import HookedLLaVA
    from hooked_llava.prompt.inputs import Inputs
    from hooked_llava.sae import SparseAutoencoder
    from hooked_llava.toy import Scene

PAPER_PROMPT = "<image>"
PAPER_QUESTION = "What do you see in this image?"
_EMBEDDED_QUESTIONS = (
    ("demo", "What color is the star?"),
    ("demo", "Is the star solid or striped?"),
    ("one-shape", "What shape is this?"),
)
_WORLD_SEED, _WORLD_QUESTION = 9_000_041, "What is there?"
_LISTED, _WORDS = 12, 5

ImageFolder = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="The images, whose prompt is then the image alone, as in the paper, or --question; or where the table's are.",
    ),
]
NImages = Annotated[int, at_least(2, "--n-images", help="How many images of tiny-shapes are drawn.")]
Features = Annotated[
    list[int] | None,
    typer.Option(
        "--feature", metavar="N", help="Explain this feature; may be repeated. Default: those active most often."
    ),
]
TopFeatures = Annotated[int, at_least(1, "--top", help="How many features are explained, at most.")]
Grid = Annotated[
    str, typer.Option(metavar="NAME", help="Whose patches of an image count: all, or base for the paper's.")
]
Ask = Annotated[
    list[str] | None,
    typer.Option("--ask", metavar="QUESTION", help="What is asked with each feature set; may be repeated."),
]
About = Annotated[
    str | None,
    typer.Option(metavar="IMAGE", help="The image that it is asked about. Default: a white one, as in the paper."),
]
Strength = Annotated[
    float, typer.Option(metavar="X", help="Each feature is set to X times its largest activation, at the image.")
]
Out = Annotated[
    Path,
    typer.Option(
        metavar="FOLDER",
        help="Where everything goes: the store, explanations, scores, and gallery.html. The same command again goes on "
        "where it stopped.",
    ),
]


@dataclass(frozen=True, kw_only=True)
class ImageOptions(DataOptions):
    """The images whose features are explained."""

    images: ImageFolder = None
    n_images: NImages = 200

    def rows_and_scenes(self, model: ModelOptions) -> tuple[list[StudyRow], list[Scene] | None]:
        """The prompts, and what their images hold if they are drawn; raises `InputError` as `DataOptions.rows`."""
        if self.images is not None and self.dataset is None and self.question is None:
            return replace(self, question=PAPER_PROMPT).rows(model), None
        drawn = self.dataset == EMBEDDED_WORLD or (self.dataset is None and model.is_tiny_shapes)
        if self.images is not None or not drawn:
            return self.rows(model), None
        import numpy as np

        from hooked_llava.datasets import StudyRow
        from hooked_llava.toy import sample_scene

        rng = np.random.default_rng(_WORLD_SEED)
        scenes = [sample_scene(rng) for _ in range(self.n_images)]
        rows = [
            StudyRow(id=str(i), question=_WORLD_QUESTION, answer="", image=scene.render())
            for i, scene in enumerate(scenes)
        ]
        return rows, scenes


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """What the model is asked while a feature is set."""

    ask: Ask = None
    about: About = None
    strength: Strength = 1.0

    def prepare(self, model: HookedLLaVA, options: ModelOptions) -> Inputs:
        """The questions; raises `InputError` for an image that is not there."""
        from PIL import Image

        template = options.template_name
        if self.ask is None and self.about is None and options.is_tiny_shapes:
            images, questions = zip(*_EMBEDDED_QUESTIONS, strict=True)
            return model.prepare(list(questions), [open_image(name) for name in images], template=template)
        questions = self.ask or [PAPER_QUESTION]
        side = model.config.vision.image_size
        white = Image.new("RGB", (side, side), "white")
        image = white if self.about is None else open_image(self.about)
        return model.prepare(list(questions), [image] * len(questions), template=template)


@command(
    "sae explain",
    "sae explain --images photos --explainer server:Qwen/Qwen2.5-VL-72B-Instruct --base-url http://localhost:8000/v1 "
    "--sae lmms-lab/llama3-llava-next-8b-hf-sae-131k -m llava-hf/llama3-llava-next-8b-hf --dtype bfloat16",
)
def explain(
    who: ExplainerOptions,
    data: ImageOptions,
    autoencoder: SAEOptions,
    model_options: ModelOptions,
    asked: QuestionOptions,
    feature: Features = None,
    top: TopFeatures = 200,
    grid: Grid = "all",
    max_new_tokens: MaxNewTokens = 12,
    out: Out = Path("features"),
) -> None:
    """Explain features by a larger model, score what it says, and write a page to browse and search them."""
    if out.is_file() or not out.expanduser().parent.is_dir():
        raise InputError(f"--out {out} is a file, or in a folder that does not exist; expected a folder's name.")
    if asked.about is not None:
        open_image(asked.about)
    who.check()
    with busy("reading the images"):
        rows, scenes = data.rows_and_scenes(model_options)
        judges = who.judges(scenes, chosen_device(model_options.device))
    with needs_figures():
        from hooked_llava.viz.pages.gallery import gallery_page
    model = model_options.load()
    sae = autoencoder.load(model.cfg.device)
    questions = asked.prepare(model, model_options)
    store = _stored(model, sae, rows, out, model_options, autoencoder)
    explained = _explained(store, judges, feature, top, grid, out)
    scores = _scored(store, explained, judges, grid, out)
    numbers = [one.feature for one in explained if store.largest[one.feature] > 0]
    steered, words = None, None
    if numbers:
        values = {n: asked.strength * float(store.largest[n]) for n in numbers}
        how = {"max_new_tokens": max_new_tokens, "any_model": autoencoder.any_model}
        steered = _steered(model, sae, values, questions, out, **how)
        words = _words(model, sae, numbers)
    best = _best_first(explained, scores)
    with busy("drawing"):
        path = gallery_page(store, best, scores, words=words, steered=steered, grid=grid).save(out / "gallery.html")
    _show(store, best, scores, steered)
    say_where(path)


def _stored(
    model: HookedLLaVA, sae: SparseAutoencoder, rows: Any, out: Path, options: ModelOptions, which: SAEOptions
) -> FeatureStore:
    """The active features of every image, on disk."""
    from hooked_llava.features import FeatureStore

    bare = all(row.question == PAPER_PROMPT for row in rows)
    template = None if bare else options.template_name
    return FeatureStore.build(model, sae, rows, out / "store", any_model=which.any_model, template=template)


def _explained(
    store: FeatureStore, judges: Judges, features: Sequence[int] | None, top: int, grid: str, out: Path
) -> list[Explanation]:
    """What is said of the features that were named, or of those that are active most often."""
    import numpy as np

    from hooked_llava.features import explain_features

    chosen = features
    if chosen is None:
        often = np.argsort(-store.frequency, kind="stable")[:top]
        chosen = often[store.frequency[often] > 0].tolist()
        if not chosen:
            raise InputError("No feature is active in any image; give other images, or another autoencoder.")
    return explain_features(store, judges.explainer, chosen, grid=grid, out=out / "explanations.json")


def _scored(
    store: FeatureStore, explained: Sequence[Explanation], judges: Judges, grid: str, out: Path
) -> xr.Dataset | None:
    """The explanations' scores, as far as there is somebody to judge."""
    if not judges.scores:
        return None
    from hooked_llava.features import score_features

    asked = {"said": [[one.feature, one.phrase, *one.images] for one in explained], "scores": judges.scores}
    asked |= {"grid": grid, "store": store.about.get("first_prompt"), "sae": store.about.get("sae")}
    with busy("scoring"):
        return _kept(out / "scores", asked, lambda: score_features(store, explained, grid=grid, **judges.by_score()))


def _steered(
    model: HookedLLaVA, sae: SparseAutoencoder, values: dict[int, float], questions: Inputs, out: Path, **how: Any
) -> xr.Dataset:
    """The answers with each feature set."""
    from hooked_llava.features import steered_answers
    from hooked_llava.model.weights_id import weights_hash
    from hooked_llava.results.provenance import image_hashes

    asked = {"values": list(values.items()), "questions": questions.prompts, "images": image_hashes(questions), **how}
    asked |= {"weights": weights_hash(model), "sae": weights_hash(dict(sae.state_dict()))}
    with busy("steering"):
        return _kept(out / "steered", asked, lambda: steered_answers(model, sae, values, questions, **how))


def _words(model: HookedLLaVA, sae: SparseAutoencoder, features: list[int]) -> xr.Dataset | None:
    """The words that features write; of an autoencoder whose vectors are not the residual stream's there are none."""
    from hooked_llava.features import written_words

    return written_words(model, sae, features, _WORDS) if sae.cfg.d_in == model.cfg.d_model else None


def _kept(path: Path, asked: dict[str, Any], measure: Callable[[], xr.Dataset]) -> xr.Dataset:
    """A result as it lies in a file, if the same was asked; else measured, and written there."""
    from hooked_llava.errors import CheckpointError
    from hooked_llava.results import load, save

    path, wanted = path.with_suffix(".safetensors"), json.dumps(asked)
    if path.is_file():
        try:
            held = load(path)
        except (CheckpointError, InputError):
            held = None
        if held is not None and held.attrs.get("asked") == wanted:
            return cast("xr.Dataset", held)
    found = measure()
    save(found.assign_attrs(asked=wanted), path)
    return found


def _best_first(explained: Sequence[Explanation], scores: xr.Dataset | None) -> list[Explanation]:
    """Those whose first score is farthest above chance first, those without one last."""
    if scores is None:
        return sorted(explained, key=lambda one: not one.found)
    import numpy as np

    from hooked_llava.features.scores import chance
    from hooked_llava.options.feature_scores import FEATURE_SCORES

    first = next(name for name in FEATURE_SCORES if name in scores)
    by_chance = chance(scores, first)
    above = scores[first] if by_chance is None else scores[first] - by_chance
    return [explained[i] for i in np.argsort(-np.nan_to_num(above.values, nan=-np.inf), kind="stable")]


def _show(
    store: FeatureStore, best: Sequence[Explanation], scores: xr.Dataset | None, steered: xr.Dataset | None
) -> None:
    """The best explained features, a line each."""
    from hooked_llava.features.scores import chance
    from hooked_llava.options.feature_scores import FEATURE_SCORES

    found = [one for one in best if one.found]
    images = counted(store.n_images, "image")
    say(f"{counted(len(best), 'feature')} of [bold]{escape(store.hook)}[/bold] in {images}, {len(found)} explained.")
    if not found:
        say("Nothing was said of any of them.")
        return
    names = [name for name in FEATURE_SCORES if scores is not None and name in scores]
    titles = [FEATURE_SCORES[name].title for name in names]
    rows = []
    for one in found[:_LISTED]:
        row = [str(one.feature), escape(one.phrase), one.concept or ""]
        for name in names:
            assert scores is not None
            value = float(scores[name].sel(feature=one.feature))
            row.append("" if value != value else f"{value:.2f}")
        rows.append([*row, _changed(steered, one.feature)])
    show_table(["feature", "phrase", "concept", *titles, "answer when set"], rows, right=["feature", *titles])
    for name, title in zip(names, titles, strict=True):
        assert scores is not None
        by_chance = chance(scores, name)
        beside = "" if by_chance is None else f", on random images {float(by_chance.mean()):.2f}"
        say(f"{title}: {float(scores[name].mean()):.2f} in the mean{beside}.")


def _changed(steered: xr.Dataset | None, feature: int) -> str:
    """The first answer that is another with the feature set, with what it was before."""
    if steered is None or feature not in steered.feature:
        return ""
    after = steered.steered.sel(feature=feature).values.tolist()
    pairs = zip(steered.unsteered.values.tolist(), after, strict=True)
    return next((escape(f"{before} → {now}") for before, now in pairs if before != now), "the same")
