"""`hooked-llava sae`: train a sparse autoencoder, explain its features, steer by them, and attribute an answer to them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from hooked_llava.cli.command import command
from hooked_llava.cli.common import PromptOptions, check_writable
from hooked_llava.cli.options import MaxNewTokens, Output, at_least
from hooked_llava.cli.sae_explain import explain
from hooked_llava.cli.sae_options import SAEOptions
from hooked_llava.cli.sae_train import train
from hooked_llava.cli.terminal import (
    escape,
    examples,
    needs_figures,
    say,
    say_answer,
    say_where,
    show_table,
    shown_steps,
)
from hooked_llava.errors import InputError
from hooked_llava.options.attribution_methods import ATTRIBUTION_METHODS, AttributionMethod
from hooked_llava.options.steering_modes import STEERING_MODES

if TYPE_CHECKING:
    from hooked_llava.viz import FeaturePage

Method = StrEnum("Method", list(ATTRIBUTION_METHODS))
Mode = StrEnum("Mode", list(STEERING_MODES))
FeatureValues = Annotated[
    list[str] | None,
    typer.Option("--feature", metavar="N=VALUE", help="Set this feature to this value; may be repeated."),
]
Strengths = Annotated[str, typer.Option(metavar="X,X,...", help="What the features' values are multiplied by.")]
SteeredPositions = Annotated[
    str | None, typer.Option(metavar="SPAN", help="Where: image, text, last or another span. Default: everywhere.")
]
ModeOption = Annotated[
    Mode,
    typer.Option(help="; ".join(f"{name}: {mode.features}" for name, mode in STEERING_MODES.items()) + "."),
]
Answer = Annotated[
    str | None, typer.Option(metavar="TEXT", help="The answer that is followed. Default: the model's own first token.")
]
Versus = Annotated[str | None, typer.Option("--versus", metavar="TEXT", help="Why the answer and not this one.")]
MethodOption = Annotated[
    Method, typer.Option(help="; ".join(f"{name}: {said}" for name, said in ATTRIBUTION_METHODS.items()) + ".")
]
TopFeatures = Annotated[int, at_least(1, "--top", help="How many features are listed and drawn.")]


@dataclass(frozen=True, kw_only=True)
class SteerOptions:
    """Which features are set, where, and how strongly."""

    feature: FeatureValues = None
    strengths: Strengths = "0,1,2,4"
    positions: SteeredPositions = None
    mode: ModeOption = Mode.clamp

    def values(self) -> dict[int, float]:
        """The features' values; raises `InputError` for none, and for what is no pair of numbers."""
        found = {}
        for text in self.feature or ():
            number, _, value = text.partition("=")
            try:
                found[int(number)] = float(value)
            except ValueError:
                raise InputError(
                    f"--feature {text} is no feature with its value; expected N=VALUE, such as 12=8."
                ) from None
        if not found:
            raise InputError("There is no feature to steer by; give one with its value: --feature 12=8.")
        return found

    def numbers(self) -> list[float]:
        """The strengths; raises `InputError` for what is no number."""
        try:
            return [float(part) for part in self.strengths.split(",")]
        except ValueError:
            raise InputError(f"--strengths {self.strengths} are no numbers; expected such as 0,1,2.") from None


@command(
    'sae steer demo "What color is the star?" --feature 12=8 --positions image --answer Blue -o steering.html',
    'sae steer cat.jpg "What is this?" --sae my-sae --feature 12=8 --mode replace -m llava-hf/llava-1.5-7b-hf',
)
def steer(
    options: SteerOptions,
    prompt: PromptOptions,
    autoencoder: SAEOptions,
    answer: Answer = None,
    max_new_tokens: MaxNewTokens = 20,
    output: Output = Path("steering.html"),
) -> None:
    """Set features to values, and write a page of the answers by strength beside controls."""
    features, strengths = options.values(), options.numbers()
    check_writable(output)
    model, inputs = prompt.prepare()
    sae = autoencoder.load(model.cfg.device)
    with needs_figures():
        from hooked_llava.viz.pages.features import STEERING_STEPS, steering_page
    how = {"mode": options.mode.value, "positions": options.positions, "any_model": autoencoder.any_model}
    with shown_steps(len(STEERING_STEPS)) as on_step:
        page = steering_page(
            model,
            inputs,
            features,
            strengths,
            answer=answer,
            sae=sae,
            max_new_tokens=max_new_tokens,
            on_step=on_step,
            **how,
        )
    path = page.save(output)
    _show_steering(page)
    say_where(path)


@command(
    'sae attribute demo "What color is the star?" -o features.html',
    'sae attribute demo "What color is the star?" --answer Orange --versus Blue --method exact',
)
def attribute(
    prompt: PromptOptions,
    autoencoder: SAEOptions,
    answer: Answer = None,
    versus: Versus = None,
    method: MethodOption = Method.gradient,
    top: TopFeatures = 6,
    max_new_tokens: MaxNewTokens = 20,
    output: Output = Path("features.html"),
) -> None:
    """Attribute the answer to features at tokens, and write a page of the largest and where they are in the image."""
    check_writable(output)
    model, inputs = prompt.prepare()
    sae = autoencoder.load(model.cfg.device)
    with needs_figures():
        from hooked_llava.viz.pages.features import ATTRIBUTION_STEPS, attribution_page
    with shown_steps(len(ATTRIBUTION_STEPS)) as on_step:
        page = attribution_page(
            model,
            sae,
            inputs,
            answer,
            versus,
            method=cast("AttributionMethod", method.value),
            n_features=top,
            max_new_tokens=max_new_tokens,
            on_step=on_step,
            any_model=autoencoder.any_model,
        )
    path = page.save(output)
    _show_attribution(page, top)
    say_where(path)


def _show_steering(page: FeaturePage) -> None:
    """The first token at each strength, of the steering and of its controls, and the answer's log-probability there."""
    from hooked_llava.prompt.token_text import visible_token
    from hooked_llava.viz.pages.features import answers_by_strength

    sweep = page.results["sweep"]
    say_answer(page.question, page.answer)
    say(f"First token, and log P({escape(sweep.answer)}), by strength:")
    rows = [
        [f"{strength:g}", *(escape(f"{visible_token(token)} {log_p:.2f}") for token, log_p in cells)]
        for strength, cells in answers_by_strength(sweep).items()
    ]
    ways = [name.replace("_", " ") for name in sweep.steered_by.values.tolist()]
    show_table(["strength", *ways], rows, right=["strength"])


def _show_attribution(page: FeaturePage, top: int) -> None:
    """The largest features, and the largest of them at tokens."""
    from hooked_llava.prompt.token_text import visible_token
    from hooked_llava.viz.pages.features import is_sure

    found, by_feature = page.results["attribution"], page.results["pooled"].isel(sae_feature=slice(top))
    say_answer(page.question, page.answer)
    versus = f" rather than {escape(found.baseline)}" if "baseline" in found.attrs else ""
    say(f"What argues for {escape(found.answer)}{versus}, in nats; sums over the image and over the text:")
    if is_sure(found):
        say(
            "The model is sure of this answer, so that no feature moves its log-probability: compare it, with --versus."
        )
    numbers = zip(*(by_feature[name].values.tolist() for name in ("sae_feature", "image", "text")), strict=True)
    rows = [[str(feature), f"{image:+.3g}", f"{text:+.3g}"] for feature, image, text in numbers]
    show_table(["feature", "image", "text"], rows, right=["feature", "image", "text"])
    of_entry = ("sae_feature", "label", "activation", "attribution")
    cells = zip(*(found.isel(entry=slice(2 * top))[name].values.tolist() for name in of_entry), strict=True)
    rows = [[str(n), escape(visible_token(at)), f"{active:.2f}", f"{value:+.3g}"] for n, at, active, value in cells]
    show_table(["feature", "at", "activation", "attribution"], rows, right=["feature", "activation", "attribution"])


app = typer.Typer(
    help="Train sparse autoencoders, explain their features, steer by them, and attribute answers to them.",
    epilog=examples(
        "sae train --steps 200 --out my-sae", "sae explain", 'sae attribute demo "What color is the star?"'
    ),
    no_args_is_help=True,
)
for _command in (train, explain, steer, attribute):
    app.command(epilog=_command.epilog)(_command.run)
