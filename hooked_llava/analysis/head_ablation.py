"""Does the answer depend on these heads?

Scores say what a head writes; whether it is needed is found by taking it away. Each head's z at the answer's position is
replaced by its mean over reference prompts, so that what all prompts share stays and what this one says goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.analysis.maps.scores import check_heads
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.readout.answer import answer_is_said
from hooked_llava.readout.answer_cache import Target, read_target
from hooked_llava.replay.intervention import Intervention
from hooked_llava.replay.reference_mean import Reference, reference_means
from hooked_llava.replay.replay import Replay
from hooked_llava.results.arrays import to_numpy
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA

Replacement = Literal["mean", "zero"]
Sets = Mapping[str, Sequence[tuple[int, int]]] | Sequence[tuple[int, int]]


def ablate_heads(
    model: HookedLLaVA,
    inputs: InputsLike,
    heads: Sets,
    target: Target = None,
    *,
    reference: Reference | None = None,
    replace: Replacement = "mean",
) -> xr.Dataset:
    """What the answer loses when sets of heads are taken away at the position where it is read, through Replay.

    Args:
        model: the model.
        inputs: prompts, anything `model.as_inputs` takes; several give a last axis prompt.
        heads: (layer, head) pairs taken away together, or several such sets by name, such as the 1, 2, 4, ... best.
        target: answer that is scored, one token each; the model's own by default.
        reference: prompts over which each head's z is averaged, for "mean", or what else `mean_of=` of an intervention takes;
            the inputs themselves by default, which then must be several.
        replace: what takes the place of a head's z.

    Returns `log_probability` and `correct` (whether the answer is still the most probable token), [set, prompt], the
    first set being "none". Raises `InputError` for heads that are not there, a set of the name "none", and a mean over a
    single prompt.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare(["Who made the star?", "Who made the ring?"])
    >>> everything = [(layer, head) for layer in range(model.cfg.n_layers) for head in range(model.cfg.n_heads)]
    >>> lost = ablate_heads(model, inputs, {"one": [(2, 3)], "all": everything})
    >>> lost.correct.values[0].tolist()
    [True, True]
    """
    prompts = model.as_inputs(inputs)
    sets = _sets(model, heads)
    one_of(replace, get_args(Replacement), "replace")
    others = prompts if reference is None else reference
    if replace == "mean" and isinstance(others, Inputs) and len(others) < 2:
        raise InputError("replace='mean' over 1 prompt changes nothing; give reference= several prompts.")
    found = read_target(model, prompts, target)
    if found.logit_positions.shape[1] != 1:
        raise InputError("ablate_heads scores answers of one token; give a word that is one, or its first token.")
    with provenance("ablate_heads", model, prompts, n_forward=1, replace=replace, heads=sets) as made:
        means = _means(model, others) if replace == "mean" else None
        replay = Replay(model, found.inputs)
        found = found.with_own(model, replay.kept_logits("last"))
        assert found.ids is not None
        runs = [[_replacement(layer, head, means) for layer, head in pairs] for pairs in sets.values()]
        logits = replay.run(runs).reshape(len(sets), len(prompts), 1, -1)
        log_p, right = found.log_probability(logits), answer_is_said(logits, found.ids)
        made.n_forward = 1 + (means is not None)
        dims = ("set", "prompt")
        return xr.Dataset(
            {"log_probability": (dims, to_numpy(log_p)), "correct": (dims, right.cpu().numpy())},
            coords={"set": list(sets), "n_heads": ("set", [len(set(pairs)) for pairs in sets.values()])},
            attrs=made.attrs(**found.attrs(model, "target"), work=replay.work.forwards),
        )


def _sets(model: HookedLLaVA, heads: Sets) -> dict[str, list[tuple[int, int]]]:
    """The sets by name, checked, after that of no head."""
    cfg = model.config.language
    named = heads if isinstance(heads, Mapping) else {"heads": heads}
    if "none" in named:
        raise InputError("A set of heads is named 'none', as the run with all heads is; give it another name.")
    return {"none": []} | {name: check_heads(pairs, cfg.n_layers, cfg.n_heads) for name, pairs in named.items()}


def nested_sets(name: str, heads: Sequence[tuple[int, int]], sizes: Sequence[int]) -> dict[str, list[tuple[int, int]]]:
    """The first so many heads of a ranking, for several sizes, as `ablate_heads` takes them: "name 4" and so on.

    >>> list(nested_sets("top", [(2, 3), (2, 1), (0, 4)], (1, 3)))
    ['top 1', 'top 3']
    """
    if outside := [size for size in sizes if not 1 <= size <= len(heads)]:
        raise InputError(f"Sizes {outside} of a ranking of {len(heads)} heads; expected 1 to {len(heads)}.")
    return {f"{name} {size}": list(heads[:size]) for size in sizes}


def random_heads(model: HookedLLaVA, seed: int) -> list[tuple[int, int]]:
    """All heads of the language tower in random order: the ranking that every other has to beat.

    >>> from hooked_llava import HookedLLaVA
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> len(set(random_heads(model, 0))) == model.cfg.n_layers * model.cfg.n_heads
    True
    """
    n_heads = model.cfg.n_heads
    order = np.random.default_rng(seed).permutation(model.cfg.n_layers * n_heads)
    return [divmod(int(i), n_heads) for i in order]


def _means(model: HookedLLaVA, reference: Reference) -> list[Float[Tensor, "head d_head"]]:
    """Every head's mean z at the answer's position."""
    places = [(("z", layer), "last") for layer in range(model.cfg.n_layers)]
    return [mean[-1] if mean.ndim > 2 else mean for mean in reference_means(model, reference, places)]


def _replacement(layer: int, head: int, means: list[Tensor] | None) -> Intervention:
    if means is None:
        return Intervention(("z", layer), positions="last", heads=[head], zero=True)
    return Intervention(("z", layer), positions="last", heads=[head], value=means[layer][head])
