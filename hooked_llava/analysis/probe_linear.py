"""Is something written in the activations of a layer so that a linear map can read it?

A linear probe: logistic regression from the activations of many prompts to what is known of them, tested on prompts that it was
not fitted to. Beside its accuracy stand that of a control, whose labels say nothing of the prompt (Hewitt & Liang 2019,
arXiv 1909.03368), and the share of the most frequent label. What a probe reads is there. A probe does not show that the model
uses it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, SupportsIndex, get_args

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int
from torch import Tensor

from hooked_llava.checks import finite_number, one_of, whole_number
from hooked_llava.datasets.forwards import PLACES, ModelSource, source_of
from hooked_llava.datasets.places import PLACE_COLUMNS
from hooked_llava.datasets.prompts import Progress
from hooked_llava.errors import CheckpointError, InputError, counted
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.precision import at_least_float32
from hooked_llava.readout.resid import resid_names
from hooked_llava.results.arrays import load, resid_coords, save
from hooked_llava.results.provenance import Provenance

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

    from hooked_llava.model.llava import HookedLLaVA

Pool = Literal["mean", "last"]
Labels = str | Sequence[Any]
"""One for each prompt, or the name under which every entry of the data holds it."""
_ANALYSIS = "probe_linear"
_STEPS, _TOLERANCE = 2000, 1e-6  # of the optimizer: steps at most, and the largest gradient at the end


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A linear probe of every layer; `probe_linear` makes it.

    Attributes:
        result (xr.Dataset): What `probe_linear` says of accuracy, and the probes fitted to all prompts: `weight`
            [layer, label, d] and `bias` [layer, label], of the activation as it is. Along `prompt` stand what was `given`,
            `control_label`, and `tested_in`, its fold.
    """

    result: xr.Dataset

    def hook(self, layer: SupportsIndex) -> str:
        """Full name of the hook that is read in a layer (from the end where negative); raises `InputError` for no layer."""
        return str(self._at(layer)["hook"].item())

    def direction(self, layer: SupportsIndex, label: Any = None) -> Float[Tensor, " d"]:
        """The direction along which a layer's probe sees more of a label, for `steer` at `hook(layer)`; raises `InputError`.

        Of two labels the last is the default; its direction is the way from the other.
        """
        labels = [str(name) for name in self.result["label"].values]
        if label is None and len(labels) != 2:
            raise InputError(
                f"label=None, and the probe tells {len(labels)} labels apart; give one of {', '.join(labels)}."
            )
        name = labels[-1] if label is None else one_of(str(label), labels, "label")
        return torch.from_numpy(self._at(layer)["weight"].sel(label=name).values.copy())

    def predict(self, activations: Float[Tensor, "*batch d"], layer: SupportsIndex) -> np.ndarray:
        """The label that a layer's probe reads in activations; raises `InputError` for another width."""
        at = self._at(layer)
        weight, bias = (torch.from_numpy(at[name].values) for name in ("weight", "bias"))
        if activations.shape[-1] != weight.shape[1]:
            raise InputError(f"activations have width {activations.shape[-1]}; the probe reads {weight.shape[1]}.")
        logits = activations.detach().cpu().to(weight.dtype) @ weight.T + bias
        return self.result["label"].values[logits.argmax(-1).numpy()]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to one safetensors file, as `hooked_llava.results.save` writes results."""
        save(self.result, path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> LinearProbe:
        """Read what `save` wrote; raises `CheckpointError` for any other file."""
        found = load(path)
        if not isinstance(found, xr.Dataset) or found.attrs.get("analysis") != _ANALYSIS:
            raise CheckpointError(
                f"{path} holds a result of {found.attrs.get('analysis')!r}; expected one of {_ANALYSIS!r}."
            )
        return cls(found)

    def _at(self, layer: SupportsIndex) -> xr.Dataset:
        known = self.result["layer"].values.tolist()
        number = whole_number(layer, "layer")
        found = known[number] if -len(known) <= number < 0 else number
        if found not in known:
            raise InputError(f"layer={layer!r} was not probed; expected one of {known}, or a number from the end.")
        return self.result.isel(layer=known.index(found))


def probe_linear(
    model: HookedLLaVA,
    data: Any,
    labels: Labels = "answer",
    *,
    hook: str | tuple[Any, ...] | None = None,
    tokens: str = "last",
    pool: Pool = "mean",
    types: Labels | None = None,
    groups: Labels | None = None,
    folds: int = 5,
    penalty: float = 1.0,
    seed: int = 0,
    prompts_per_forward: int = 8,
    images: str | os.PathLike[str] | None = None,
    **options: Any,
) -> LinearProbe:
    """Linear probes of all layers: `accuracy` and `control` [layer, fold], `majority` [fold], in the `result` of a `LinearProbe`.

    All layers are read in one forward pass for each `prompts_per_forward` prompts, which ends at the highest. The probe is a
    logistic regression of standardized activations; in each fold it is fitted to the other folds' prompts and asked of its own.

    Args:
        model: the model.
        data: prompts, as `hooked_llava.sae.activation_stream` takes them: rows of a table (`StudyRow`, with the spans that
            `prepare_rows` names), a DataFrame, pairs (image, question), or `Inputs`.
        labels: what is to be read, one for each prompt; or where rows hold it, such as "answer" or "kind".
        hook: short name of a hook, read in all its layers ("mlp_out", "z" with its heads side by side, "vision.resid_post");
            by default what enters every layer, and as layer n_layers what leaves the last.
        tokens: span whose positions are read; "all" for every one.
        pool: "mean" over the span's positions, or the "last" of them.
        types: for the control of Hewitt & Liang, what a prompt is of (the word that is asked about), likewise: prompts of one
            type get the same random label. By default the labels are shuffled among the prompts.
        groups: prompts of one group (such as those about one image), likewise, are never in different folds.
        folds: how many.
        penalty: of the squared weights; 1 / C of scikit-learn.
        seed: of the folds and of the control.
        prompts_per_forward: prompts in one forward pass.
        images: folder of the images that the data name.
        options: go to `model.prepare`.

    `majority` is the accuracy of always saying the most frequent label of the other folds. Raises `InputError` for labels that
    do not fit the data or are rarer than the folds, and for hooks without a vector at every position; `SpanError` for spans
    that a prompt does not have.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> asked = [(None, f"Who {verb} the {shape}?") for shape in ("star", "ring", "moon") for verb in ("made", "owns")]
    >>> probe = probe_linear(model, asked, ["made", "owns"] * 3, tokens="question", folds=3)
    >>> probe.result.accuracy.dims, probe.direction(2).shape
    (('layer', 'fold'), torch.Size([128]))
    """
    fitting = _Fitting(one_of(pool, get_args(Pool), "pool"), folds, penalty, seed)
    known = _Known(*(None if of is None else _listed(data, of, what) for what, of in _named(labels, types, groups)))
    how: dict[str, Any] = {"tokens": tokens, "images": images, "options": options}
    source = source_of(model, _hooks(model, hook), data, prompts_per_forward=prompts_per_forward, **how)
    return LinearProbe(_measured(model, source, known, fitting, hook))


@dataclass(frozen=True)
class _Fitting:
    """How probes are fitted; the fields are arguments of `probe_linear`."""

    pool: Pool
    folds: int
    penalty: float
    seed: int

    def __post_init__(self) -> None:
        whole_number(self.folds, "folds", least=2)
        whole_number(self.seed, "seed", least=0)
        if finite_number(self.penalty, "penalty", least=0.0) == 0:
            raise InputError("penalty=0 lets the weights grow without end; expected a number above 0, such as 1.")


@dataclass(frozen=True)
class _Known:
    """What is known of each prompt, in words."""

    labels: list[str] | None
    types: list[str] | None
    groups: list[str] | None

    def check(self, n_prompts: int | None, folds: int) -> None:
        """Raise `InputError` for what does not fit the prompts or the folds."""
        for what, of in _named(self.labels, self.types, self.groups):
            if of is not None and n_prompts is not None and len(of) != n_prompts:
                raise InputError(
                    f"{what} has {counted(len(of), 'entry', 'entries')} for {n_prompts} prompts; give one for each."
                )
        counts = Counter(self.labels)
        if len(counts) < 2:
            raise InputError(f"labels are all {next(iter(counts), None)!r}; a probe tells at least two apart.")
        if rare := [label for label, n in counts.items() if n < folds]:
            raise InputError(
                f"labels {rare} occur less than folds={folds} times; leave their prompts out, or give fewer folds."
            )
        if self.types is not None and len(set(self.types)) < 2:
            raise InputError("types are all the same; expected at least two, each of which gets a random label.")
        if self.groups is not None and len(set(self.groups)) < folds:
            raise InputError(f"groups names {len(set(self.groups))} groups; expected at least folds={folds}.")


def _named(labels: Any, types: Any, groups: Any) -> list[tuple[str, Any]]:
    return [("labels", labels), ("types", types), ("groups", groups)]


def _measured(model: HookedLLaVA, source: ModelSource, known: _Known, fitting: _Fitting, hook: Any) -> xr.Dataset:
    """What is read of every layer, with what a result must say about it."""
    known.check(source.prompts.n_rows, fitting.folds)
    about: dict[str, Any] = asdict(fitting) | ({} if hook is None else {"hook": hook})
    about["control"] = "labels shuffled" if known.types is None else "labels by type"
    made = Provenance.of(_ANALYSIS, model, "", tokens=source.tokens, **about)
    activations, n_forward = _activations(source, fitting.pool)
    known.check(len(activations[0]), fitting.folds)
    found = _probed(activations, known, fitting)
    attrs = made.attrs(n_forward=n_forward, n_prompts=found.sizes["prompt"])
    attrs.pop("prompt")
    return found.assign_coords(_layers(model, source.hooks, hook)).assign_attrs(attrs)


def _hooks(model: HookedLLaVA, hook: str | tuple[Any, ...] | None) -> list[str]:
    """Full names of what is read, layer by layer."""
    if hook is None:
        return resid_names(model)
    names = model.hooks_table.resolve(hook, with_image=True)
    if len({model.hooks_table[name].spec for name in names}) != 1:
        raise InputError(
            f"hook={hook!r} names hooks of several kinds, {', '.join(names)}; expected one, such as 'mlp_out'."
        )
    return names


def _listed(data: Any, of: Labels, what: str) -> list[str]:
    """A label for each prompt in words: as they are given, or out of the entries of the data."""
    if not isinstance(of, str):
        return [str(label) for label in of]
    if hasattr(data, "columns"):
        entries: list[Any] = data.to_dict("records")
    else:
        entries = list(data) if isinstance(data, (list, tuple)) else []
    held = [entry.get(of) if isinstance(entry, dict) else getattr(entry, of, None) for entry in entries]
    if not held or any(label is None for label in held):
        raise InputError(
            f"{what}={of!r} is not in every entry of data; expected {what} as a list, one for each prompt, or what rows hold, "
            "such as 'answer' or 'kind' of a StudyRow."
        )
    return [str(label) for label in held]


def _activations(source: ModelSource, pool: Pool) -> tuple[list[Float[np.ndarray, "prompt d"]], int]:
    """One vector for each prompt at every hook, in the order of the data, and the number of forward passes."""
    kept: dict[str, list[Tensor]] = {name: [] for name in source.hooks}
    n_forward = 0
    with closing(source.chunks(Progress(0, 0), shuffled=False)) as chunks:
        for chunk in chunks:
            n_forward += 1
            rows = chunk.rows[PLACES][:, PLACE_COLUMNS.index("row")]
            _, at, lengths = torch.unique_consecutive(rows, return_inverse=True, return_counts=True)
            pooled = torch.stack([_pooled(chunk.rows[name], at, lengths, pool) for name in source.hooks]).cpu()
            for name, of_prompts in zip(source.hooks, pooled, strict=True):
                kept[name].append(of_prompts)
    return [torch.cat(parts).numpy() for parts in kept.values()], n_forward


def _pooled(
    vectors: Float[Tensor, "activation d"],
    at: Int[Tensor, " activation"],
    lengths: Int[Tensor, " prompt"],
    pool: Pool,
) -> Float[Tensor, "prompt d"]:
    """The mean over each prompt's activations, or the last of them."""
    wide, device = at_least_float32(vectors), vectors.device
    if pool == "last":
        return wide.index_select(0, to_device(lengths.cumsum(0) - 1, device)).double()
    total = wide.new_zeros(len(lengths), wide.shape[1], dtype=torch.float64).index_add_(
        0, to_device(at, device), wide.double()
    )
    return total / to_device(lengths, device)[:, None]


def _probed(layers: Sequence[Float[np.ndarray, "prompt d"]], known: _Known, fitting: _Fitting) -> xr.Dataset:
    """Accuracies in folds, and the probes fitted to everything."""
    folds, penalty = fitting.folds, fitting.penalty
    labels = np.array(known.labels)
    control = _control(labels, known.types, fitting.seed)
    tested_in = _folds(labels, known.groups, folds, fitting.seed)
    accuracy, chance = (
        [[_accuracy(x, y, tested_in == fold, penalty) for fold in range(folds)] for x in layers]
        for y in (labels, control)
    )
    majority = []
    for fold in range(folds):
        (usual, _), *_ = Counter(labels[tested_in != fold].tolist()).most_common(1)
        majority.append(float((labels[tested_in == fold] == usual).mean()))
    weights, biases = zip(*(_linear_map(_fitted(x, labels, penalty)) for x in layers), strict=True)
    return xr.Dataset(
        {
            "accuracy": (("layer", "fold"), np.array(accuracy)),
            "control": (("layer", "fold"), np.array(chance)),
            "majority": ("fold", np.array(majority)),
            "weight": (("layer", "label", "d"), np.stack(weights).astype(np.float32)),
            "bias": (("layer", "label"), np.stack(biases).astype(np.float32)),
        },
        coords={
            "label": np.unique(labels),
            "prompt": range(len(labels)),
            "given": ("prompt", labels),
            "control_label": ("prompt", control),
            "tested_in": ("prompt", tested_in),
        },
    )


def _control(labels: np.ndarray, types: list[str] | None, seed: int) -> np.ndarray:
    """Labels that say nothing of the prompt: shuffled, or a random one for each type, drawn as often as labels are."""
    rng = np.random.default_rng(seed)
    if types is None:
        return rng.permutation(labels)
    kinds, kind_of = np.unique(types, return_inverse=True)
    while len(set(drawn := rng.choice(labels, len(kinds)))) < 2:
        pass
    return drawn[kind_of]


def _folds(labels: np.ndarray, groups: list[str] | None, folds: int, seed: int) -> Int[np.ndarray, " prompt"]:
    """The fold in which each prompt is tested; every fold has each label as often as the others, as far as groups allow."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    found = np.full(len(labels), -1)
    for fold, (_, tested) in enumerate(kind(folds, shuffle=True, random_state=seed).split(labels, labels, groups)):
        found[tested] = fold
    if len(set(found.tolist())) < folds:
        raise InputError(f"groups cannot be divided into folds={folds} that all have prompts; give fewer folds.")
    return found


def _accuracy(x: np.ndarray, labels: np.ndarray, tested: np.ndarray, penalty: float) -> float:
    """The share of tested prompts that a probe fitted to the others reads correctly."""
    known = labels[~tested]
    said = known[:1] if len(set(known)) == 1 else _fitted(x[~tested], known, penalty).predict(x[tested])
    return float((said == labels[tested]).mean())


def _fitted(x: np.ndarray, labels: np.ndarray, penalty: float) -> Pipeline:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(C=1 / penalty, max_iter=_STEPS, tol=_TOLERANCE)).fit(
        x, labels
    )


def _linear_map(fitted: Pipeline) -> tuple[Float[np.ndarray, "label d"], Float[np.ndarray, " label"]]:
    """Weights and biases of the activation itself, a row for each label; two labels share what tells them apart."""
    scaler, regression = (step for _, step in fitted.steps)
    weight, bias = regression.coef_ / scaler.scale_, regression.intercept_
    bias = bias - weight @ scaler.mean_
    if len(weight) == 1:
        weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    return weight, bias


def _layers(model: HookedLLaVA, names: Sequence[str], hook: Any) -> dict[str, Any]:
    """Coordinates of the axis layer, with the hook that is read in each."""
    if hook is None:
        return {**resid_coords(model.cfg.n_layers), "hook": ("layer", list(names))}
    return {"layer": [model.hooks_table[name].layer or 0 for name in names], "hook": ("layer", list(names))}
