"""The page builder: results, words and figures become one HTML file that needs no network, written whole or not at all."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import jinja2

import hooked_llava
from hooked_llava.errors import InputError
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.replay.progress import progress_bar
from hooked_llava.storage import written_whole
from hooked_llava.viz.pages.embed import is_small, pixels, uri, visible
from hooked_llava.viz.style import format_small

_PACKAGES = ("torch", "transformers", "transformer_lens")


@dataclass(frozen=True, kw_only=True)
class Page:
    """A finished page with the results it shows; in a notebook it shows itself.

    Attributes:
        question (str): What was asked.
        answer (str): What the model said, greedily decoded.
        html (str): The page, self-contained.
        results (dict[str, Any]): The labelled arrays that the figures show.
    """

    question: str
    answer: str
    html: str = field(repr=False)
    results: dict[str, Any] = field(repr=False)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page, all of it or nothing, and return its path; raises `InputError` where that cannot be done."""
        path = Path(path).expanduser()
        try:
            with written_whole(path) as partial:
                partial.write_text(self.html, encoding="utf-8")
        except OSError as error:
            raise InputError(
                f"The report cannot be written to {str(path)!r} ({error.strerror}); choose another place."
            ) from error
        return path

    def _repr_html_(self) -> str:
        # In a frame of its own, so that the page's style does not spill into the notebook.
        frame = "width: 100%; height: 48rem; border: 1px solid #d5dbe1"
        return f'<iframe srcdoc="{html.escape(self.html)}" style="{frame}" title="report"></iframe>'


AnyPage = TypeVar("AnyPage", bound=Page)


def make_page(
    kind: type[AnyPage],
    template: str,
    shown: Mapping[str, Any],
    footer: Mapping[str, str],
    results: dict[str, Any],
    **said: Any,
) -> AnyPage:
    """A template filled in, as a page of its kind.

    Args:
        kind: `Page`, or what is derived from it.
        template: name of a template in `viz/templates`. It extends `page.html.jinja`, which has the style, the blocks title,
            head and main, and the footer; sections and figures are macros.
        shown: the template's variables, figures and images as they are; text is escaped.
        footer: entries of the footer, by name.
        results: what the page shows.
        said: question, answer, and whatever else the kind has, as text; variables of the template too.
    """
    filled = fill_template(template, {**shown, **said, "footer": footer})
    return kind(html=filled, results=results, **said)


def fill_template(template: str, shown: Mapping[str, Any]) -> str:
    """The HTML of one template; raises jinja2's `UndefinedError` if one of its variables is missing."""
    return _environment().get_template(f"{template}.html.jinja").render(shown)


@cache
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("hooked_llava.viz"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters |= {"format_small": format_small, "pixels": pixels, "uri": uri, "visible": visible}
    environment.tests["small"] = is_small
    return environment


def run_footer(model: HookedLLaVA, prompt: Inputs, cost: str) -> dict[str, str]:
    """What a page of one prompt says below: model, precision, prompt, what it cost, and with which packages it was made."""
    rows, columns = model.config.vision.patch_grid
    sizes = f"{model.cfg.n_layers} layers of {model.cfg.n_heads} heads, d_model {model.cfg.d_model}"
    return {
        "Model": f"{model.cfg.model_name or 'unnamed'} ({sizes}; images of {rows} x {columns} patches)",
        "Numbers": f"{str(model.cfg.dtype).removeprefix('torch.')} on {model.cfg.device}",
        "Prompt": prompt.prompts[0] if prompt.prompts else f"{prompt.shape[1]} token ids",
        "Cost": cost,
        "Made": made_with(),
    }


def made_with() -> str:
    """Today's date and the versions of the packages, for a page's footer."""
    packages = ", ".join(f"{name} {_version(name)}" for name in _PACKAGES)
    return f"{date.today().isoformat()} with hooked_llava {hooked_llava.__version__}, {packages}"


@contextmanager
def steps_reported(
    steps: tuple[str, ...], on_step: Callable[[str], None] | None, what: str
) -> Iterator[Callable[[str], None]]:
    """`on_step` itself, or without one a progress bar that shows if the work takes longer than two seconds."""
    if on_step is not None:
        yield on_step
        return
    with progress_bar(len(steps), "step", desc=what) as bar:

        def begin(step: str) -> None:
            bar.set_postfix_str(step, refresh=False)
            bar.update()

        yield begin


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from its folder without having been installed
        return "(not installed)"
