"""What an answer's cache holds, in bytes."""

from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.readout.answer_cache import AnswerCache, cache_answer


def test_bytes_are_those_that_were_forecast_and_what_is_kept_beside() -> None:
    model = HookedLLaVA.from_pretrained("tiny-shapes")
    prompt, name = model.prepare("Who made the star?"), "blocks.1.hook_resid_pre"
    plain, more = cache_answer(model, prompt), cache_answer(model, prompt, beside=[name])
    assert plain.nbytes == AnswerCache.forecast(model, prompt)
    assert more.nbytes - plain.nbytes == model.cache_size(prompt, name) > 0
