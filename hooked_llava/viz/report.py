"""One page that shows how a model arrived at its answer: everything in one HTML file, which needs no network."""

from __future__ import annotations

import html
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from time import perf_counter
from typing import Any

import jinja2
import xarray as xr

from hooked_llava.analysis import image_attention, logit_attribution, logit_lens, next_tokens
from hooked_llava.errors import InputError
from hooked_llava.input_batch import Inputs
from hooked_llava.model import HookedLLaVA
from hooked_llava.viz.page import Page, build_page

STEPS = ("answering", "next tokens", "logit lens", "layers", "heads", "attention to the picture", "drawing")
"""The parts of the work, as progress is reported."""
_PACKAGES = ("hooked_llava", "torch", "transformers", "transformer_lens")
_LENS_ANSWERS = 4


@dataclass(frozen=True)
class Report:
    """How a model came to its answer: the page, and the results it shows.

    `report.save("report.html")` writes it; in a notebook it shows itself.
    """

    question: str
    """What was asked."""
    answer: str
    """What the model said, greedily decoded."""
    html: str = field(repr=False)
    """The page, self-contained."""
    results: dict[str, Any] = field(repr=False)
    """The labelled arrays behind the figures: next_tokens, lens, components, heads, and with a picture attention."""

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, all of it or nothing, and return its path; raises `InputError` where that cannot be done."""
        path = Path(path).expanduser()
        if path.is_dir():
            raise InputError(
                f"The report cannot be written to {str(path)!r}, which is a folder; give a file name in it."
            )
        if not path.parent.is_dir():
            raise InputError(f"The report cannot be written: there is no folder {str(path.parent)!r}. Make it first.")
        try:
            _write_whole(path, self.html)
        except OSError as error:
            raise InputError(
                f"The report cannot be written to {str(path)!r} ({error.strerror}); choose another place."
            ) from error
        return path

    def _repr_html_(self) -> str:
        # In a frame of its own, so that the page's style does not spill into the notebook.
        frame = "width: 100%; height: 48rem; border: 1px solid #d5dbe1"
        return f'<iframe srcdoc="{html.escape(self.html)}" style="{frame}" title="report"></iframe>'


def explain(
    model: HookedLLaVA,
    inputs: Any,
    *,
    answer: str | int | None = None,
    baseline: str | int | None = None,
    max_new_tokens: int = 20,
    k: int = 5,
    n_heads: int = 8,
    on_step: Callable[[str], None] | None = None,
) -> Report:
    """Ask the model, look inside while it answers, and put everything on one page.

    Args:
        model: the model.
        inputs: one prompt, anything `model.as_inputs` takes; those of `model.prepare` also show pictures as they were.
        answer: the token whose logit is taken apart; the model's own first token by default.
        baseline: a token whose logit is subtracted, to see why one answer and not the other.
        max_new_tokens: length of the answer at most.
        k: how many words the tables show.
        n_heads: how many heads' attention is drawn.
        on_step: called with the name of each part of the work (`STEPS`) as it begins; by default a progress bar
            shows if it takes longer than two seconds.

    Raises `InputError` for several prompts, and for a word that is not one token.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> explain(model, model.prepare("Who made the star?"), max_new_tokens=1).html.startswith("<!doctype html>")
    True
    """
    prompt = model.as_inputs(inputs)
    if len(prompt) != 1:
        raise InputError(
            f"explain takes one prompt, got {len(prompt)}; call it once for each: inputs[0], inputs[1], ..."
        )
    if on_step is None:
        with _progress_bar() as bar:
            return _explain(model, prompt, answer, baseline, max_new_tokens, k, n_heads, _advance(bar))
    return _explain(model, prompt, answer, baseline, max_new_tokens, k, n_heads, on_step)


def _explain(
    model: HookedLLaVA,
    prompt: Inputs,
    answer: str | int | None,
    baseline: str | int | None,
    max_new_tokens: int,
    k: int,
    n_heads: int,
    on_step: Callable[[str], None],
) -> Report:
    started = perf_counter()
    on_step("answering")
    tokens = model.generate(prompt, max_new_tokens=max_new_tokens, return_type="tokens")
    text = _text(model, tokens)
    results = _results(model, prompt, answer, baseline, min(k, model.cfg.d_vocab), on_step)
    on_step("drawing")
    n_forward = tokens.shape[1] + sum(int(result.attrs["n_forward"]) for result in results.values())
    page = Page(
        model=model,
        inputs=prompt,
        answer=text,
        results=results,
        n_heads=n_heads,
        provenance=_provenance(model, prompt, n_forward, perf_counter() - started),
    )
    environment = jinja2.Environment(loader=jinja2.PackageLoader("hooked_llava.viz"), autoescape=True, trim_blocks=True)
    context = build_page(page)
    return Report(context["question"], text, environment.get_template("report.html.jinja").render(context), results)


def _results(
    model: HookedLLaVA,
    prompt: Inputs,
    answer: str | int | None,
    baseline: str | int | None,
    k: int,
    on_step: Callable[[str], None],
) -> dict[str, Any]:
    """Everything that is measured."""
    results: dict[str, xr.DataArray | xr.Dataset] = {}
    on_step("next tokens")
    results["next_tokens"] = next_tokens(model, prompt, k=k)
    likely = results["next_tokens"]["token_id"].values[0].tolist()
    scored = likely[0] if answer is None else model.to_single_token(answer) if isinstance(answer, str) else answer
    followed = [scored, *(token for token in likely if token != scored)][:_LENS_ANSWERS]
    on_step("logit lens")
    results["lens"] = logit_lens(model, prompt, answers=followed, k=k)
    on_step("layers")
    results["components"] = logit_attribution(model, prompt, scored, baseline, by="component")
    on_step("heads")
    results["heads"] = logit_attribution(model, prompt, scored, baseline, by="head")
    if prompt.n_images:
        on_step("attention to the picture")
        results["attention"] = image_attention(model, prompt)
    return results


def _text(model: HookedLLaVA, tokens: Any) -> str:
    """The generated tokens as text, without what ends or fills them."""
    ids = tokens[0].tolist()
    ends = [i for i, token in enumerate(ids) if token in model.config.eos_token_ids]
    ids = ids[: ends[0]] if ends else ids
    if model.processor is None:
        return " ".join(f"#{token}" for token in ids)
    return model.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False).strip()


def _provenance(model: HookedLLaVA, prompt: Inputs, n_forward: int, seconds: float) -> dict[str, str]:
    grid = model.config.vision.grid
    sizes = f"{model.cfg.n_layers} layers of {model.cfg.n_heads} heads, d_model {model.cfg.d_model}"
    return {
        "Model": f"{model.cfg.model_name or 'unnamed'} ({sizes}; pictures of {grid} x {grid} patches)",
        "Numbers": f"{str(model.cfg.dtype).removeprefix('torch.')} on {model.cfg.device}",
        "Prompt": prompt.prompts[0] if prompt.prompts else f"{prompt.shape[1]} token ids",
        "Cost": f"{n_forward} forward passes, {seconds:.1f} s",
        "Made": f"{date.today().isoformat()} with " + ", ".join(f"{name} {_version(name)}" for name in _PACKAGES),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its folder without having been installed
        return "(not installed)"


def _write_whole(path: Path, text: str) -> None:
    """Write beside the file and move into place, so that a failure leaves the older page as it was."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        Path(temporary).chmod(0o666 & ~mask)  # mkstemp makes files that only their owner can read
        Path(temporary).replace(path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _progress_bar() -> Any:
    from tqdm import tqdm

    return tqdm(total=len(STEPS), desc="explaining", delay=2, leave=False, unit="step")


def _advance(bar: Any) -> Callable[[str], None]:
    def begin(step: str) -> None:
        bar.set_postfix_str(step, refresh=False)
        bar.update()

    return begin
