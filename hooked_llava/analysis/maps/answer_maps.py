"""Which patches does each token of an answer come from?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import xarray as xr

from hooked_llava.analysis.maps.methods import shared_run
from hooked_llava.analysis.maps.sinks import sink_positions, without_sinks_of
from hooked_llava.analysis.patch_importance import patch_importance
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.model.requirements import supported_inputs
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.answer import read_answer
from hooked_llava.readout.answer_tokens import AnswerLike, appendable, one_answer
from hooked_llava.readout.vocabulary import decode_tokens
from hooked_llava.results.arrays import stack

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


def answer_maps(
    model: HookedLLaVA,
    inputs: Any,
    answer: AnswerLike | None = None,
    *,
    method: str = "log_increase",
    max_new_tokens: int = 20,
    without_sinks: bool = False,
    **options: Any,
) -> xr.DataArray:
    """`patch_importance(token=k)` of every token k of an answer: [token, image, patch_row, patch_col].

    Every token is read where it is predicted, after those before it. The coordinate `word` has the tokens in words. Methods
    that read from one forward pass ("log_increase", "attention", "tam") take one for all tokens; others what one map takes,
    for each token.

    Args:
        model: the model.
        inputs: one prompt with images, anything `model.as_inputs` takes.
        answer: text, a token id, or token ids; by default the answer that is appended already, otherwise what the model
            generates, greedily.
        method: one of the names in `hooked_llava.options.patch_maps.PATCH_MAPS`.
        max_new_tokens: length of a generated answer at most.
        without_sinks: leave out (NaN) what `sink_positions` finds, in one more forward pass.
        options: those of the method, as `patch_importance` takes them.

    Raises `InputError` for several prompts, for an answer without tokens, and as `patch_importance`.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.toy.images import image_path
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> maps = answer_maps(model, model.prepare("What color is the star?", images=image_path("demo")), "Orange star")
    >>> maps.word.values.tolist(), maps.n_forward
    (['Orange', 'star'], 1)
    """
    one_of(method, PATCH_MAPS, "method")
    prompt = supported_inputs("answer_maps", model, inputs)
    given, generated = _given(model, prompt, answer, max_new_tokens)
    reading = read_answer(model, prompt, given)
    assert reading.ids is not None
    subject: Any = reading.inputs
    shared = PATCH_MAPS[method].takes_cache
    if shared:
        subject = shared_run(model, prompt, reading)
    target = None if shared or reading.inputs.token_map.n_answer else given
    n_tokens = reading.ids.shape[1]
    maps = [patch_importance(model, subject, target, token=k, method=method, **options) for k in range(n_tokens)]
    words = decode_tokens(model, reading.ids[0, :, 0]).tolist()
    about = maps[0].attrs | {"analysis": "answer_maps", "target": reading.texts[0], "answer_tokens": words}
    about |= {"n_forward": sum(one.n_forward for one in maps) + shared + generated, "measured": reading.measured}
    about |= {"n_backward": sum(one.n_backward for one in maps), "n_generated": generated}
    found = stack(maps, "token").assign_coords(token=range(n_tokens), word=("token", words))
    found = found.assign_attrs({name: value for name, value in about.items() if name != "token"})
    return without_sinks_of(found, sink_positions(model, prompt)) if without_sinks else found


def _given(
    model: HookedLLaVA, prompt: Inputs, answer: AnswerLike | None, max_new_tokens: int
) -> tuple[list[AnswerLike] | None, int]:
    """The answer's tokens, None where they are appended already, and how many were generated for it."""
    if answer is not None:
        return [one_answer(model, prompt.token_map, answer)], 0
    if prompt.token_map.n_answer:
        return None, 0
    said = model.generate(prompt, max_new_tokens=max_new_tokens, return_type="tokens")
    own = appendable(model, said[0].tolist())
    if not own:
        raise InputError("The model's own answer has no tokens; give one with answer=.")
    return [own], said.shape[1]
