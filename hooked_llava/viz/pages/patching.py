"""One page about a pair of prompts: where in the model is the difference between their answers carried?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import xarray as xr
from torch import Tensor

from hooked_llava.analysis.activation_patching import activation_patching
from hooked_llava.analysis.attribution_patching import attribution_patching
from hooked_llava.errors import InputError
from hooked_llava.experiments.pairs import check_pair
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.options.directions import Direction, check_direction
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.question import question_text
from hooked_llava.readout.answer_tokens import single_token
from hooked_llava.readout.metrics import logit_difference
from hooked_llava.viz.pages.page import Page, make_page, run_footer, steps_reported
from hooked_llava.viz.pages.parts import answer_text
from hooked_llava.viz.pages.patching_context import where_the_difference_lies

STEPS = ("answering", "residual stream", "attention", "MLPs", "heads", "patches", "attribution", "drawing")
"""The parts of the work, as progress is reported."""


@dataclass(frozen=True, kw_only=True)
class PatchingReport(Page):
    """Where the difference between two answers is carried: the page, and the results it shows.

    `report.question` and `report.answer` are those of the clean prompt. The labelled arrays in `report.results` are
    resid_pre, attn_out, mlp_out, heads, estimate (attribution patching), and with an image, if it has not too many
    positions, patches: the residual stream at each of them.

    Attributes:
        corrupted_answer (str): What the model says to the corrupted prompt.
    """

    corrupted_answer: str


def patching_report(
    model: HookedLLaVA,
    clean: InputsLike,
    corrupted: InputsLike,
    *,
    answer: str | int | None = None,
    baseline: str | int | None = None,
    direction: Direction = "denoise",
    max_new_tokens: int = 20,
    max_runs: int = 2000,
    on_step: Callable[[str], None] | None = None,
) -> PatchingReport:
    """Patch one prompt's activations into the other's run, everywhere, and put what that does on one page.

    The metric is the logit of the answer minus that of the baseline.

    Args:
        model: the model.
        clean: one prompt, anything `model.as_inputs` takes.
        corrupted: another, of the same length, with images and words in the same places.
        answer: a token; by default the first that the model gives to the clean prompt.
        baseline: a token; by default the first that it gives to the corrupted prompt.
        direction: "denoise" puts clean activations into the corrupted run, "noise" the reverse.
        max_new_tokens: length of the answers at most.
        max_runs: maps of images with more cells than this are left to attribution patching, which estimates them.
        on_step: called with the name of each part of the work (`STEPS`) as it begins; by default a progress bar
            shows if it takes longer than two seconds.

    Raises `InputError` for prompts that do not match, and where both have the same answer and no tokens are given.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> report = patching_report(model, model.prepare("Who made the star?"), model.prepare("Who made the ring?"))
    >>> report.answer == report.corrupted_answer, report.html.startswith("<!doctype html>")
    (False, True)
    """
    check_direction(direction)
    pair = model.as_inputs(clean), model.as_inputs(corrupted)
    check_pair(*pair)
    started = perf_counter()
    with steps_reported(STEPS, on_step, "patching") as begin:
        begin("answering")
        said = [model.generate(prompt, max_new_tokens=max_new_tokens, return_type="tokens") for prompt in pair]
        followed = _followed(model, pair[0], said, answer, baseline)
        results = _results(model, pair, followed, direction, max_runs, begin)
        begin("drawing")
        work = _work(results, n_decoded=sum(tokens.shape[1] for tokens in said))
        cost = (
            f"{work['runs']} interventions, re-run for the work of {work['work']} forward passes; besides, "
            f"{work['n_forward']} forward passes and 1 backward pass; {perf_counter() - started:.1f} s"
        )
        footer = run_footer(model, pair[0], cost)
        if pair[1].prompts and pair[1].prompts != pair[0].prompts:
            footer["Corrupted"] = pair[1].prompts[0]
        words = [str(model.to_string(token)) for token in followed]
        shown = {**where_the_difference_lies(model, pair, words, direction, results), **work}
        own, other = (answer_text(model, tokens) for tokens in said)
        answers = {"question": question_text(pair[0]), "answer": own, "corrupted_answer": other}
        return make_page(PatchingReport, "patching", shown, footer, results, **answers)


def _work(results: dict[str, Any], n_decoded: int) -> dict[str, Any]:
    """What was run: interventions and the forward passes that they are worth, and whole forward passes besides."""
    swept = [result.attrs for name, result in results.items() if name != "estimate"]
    n_forward = n_decoded + sum(result.attrs["n_forward"] for result in results.values())
    runs, work = (sum(attrs[name] for attrs in swept) for name in ("runs", "work"))
    return {"runs": runs, "work": f"{work:.1f}", "n_forward": n_forward}


def _followed(
    model: HookedLLaVA, clean: Inputs, said: list[Tensor], answer: str | int | None, baseline: str | int | None
) -> tuple[int, int]:
    """The two tokens whose logits are compared."""
    given = (answer, baseline)
    ids = [
        int(said[i][0, 0]) if word is None else single_token(model, clean.token_map, word)
        for i, word in enumerate(given)
    ]
    if ids[0] == ids[1]:
        same = model.to_string(ids[0])
        raise InputError(
            f"Both prompts are answered with {same!r}, so there is no difference of answers to follow. Give a corrupted "
            "prompt that is answered otherwise, or name the two tokens to compare (answer and baseline; on the command "
            "line --answer and --versus)."
            if answer is None and baseline is None
            else f"The two tokens to compare are both {same!r}; name another answer or baseline."
        )
    return ids[0], ids[1]


def _results(
    model: HookedLLaVA,
    pair: tuple[Inputs, Inputs],
    followed: tuple[int, int],
    direction: Direction,
    max_runs: int,
    begin: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that is measured."""
    options: dict[str, Any] = {"metric": logit_difference(*followed), "direction": direction}
    results: dict[str, xr.DataArray | xr.Dataset] = {}
    columns = _columns(pair)
    for step, hook in zip(STEPS[1:4], ("resid_pre", "attn_out", "mlp_out"), strict=True):
        begin(step)
        results[hook] = activation_patching(model, *pair, hook=hook, positions=columns, **options)
    begin("heads")
    results["heads"] = activation_patching(model, *pair, hook="z", positions="last", **options)
    if layers := _image_layers(model, pair[0], max_runs):
        begin("patches")
        results["patches"] = activation_patching(
            model, *pair, hook="resid_pre", layers=layers, positions="image", **options
        )
    begin("attribution")
    results["estimate"] = attribution_patching(model, *pair, hooks=["resid_pre", "attn_out", "mlp_out", "z"], **options)
    return results


def _image_layers(model: HookedLLaVA, prompt: Inputs, max_runs: int) -> list[int]:
    """The layers in which every position of the images is measured: all, the first, or none."""
    n_positions = len(prompt.token_map.spans.get("image", ()))
    n_layers = model.cfg.n_layers if n_positions * model.cfg.n_layers <= max_runs else 1
    return list(range(n_layers)) if 0 < n_positions * n_layers <= max_runs else []


def _columns(pair: tuple[Inputs, Inputs]) -> list[int | str]:
    """Images as one, and the text from the first difference on: what comes before is the same in both runs."""
    ids = [inputs.input_ids[0].tolist() for inputs in pair]
    token_map = pair[0].token_map
    differing = [p for p in token_map.real if ids[0][p] != ids[1][p]]
    images = list(token_map.spans.get("image", ()))
    first = min([*differing, *images[:1]], default=token_map.real.start)
    text = [p for p in token_map["text"] if p >= first]
    before = [p for p in text if images and p < images[0]]
    return [*before, *(["image"] if images else []), *text[len(before) :]]
