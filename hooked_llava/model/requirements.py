"""What calls may need of the model, and the one place where a call is refused for what it needs: `check_supported`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from hooked_llava.architecture.missing_hooks import SIDE_BY_SIDE
from hooked_llava.errors import InputError, SpanError
from hooked_llava.model.components.hook_point import has_functions
from hooked_llava.model.components.quantized import quantized_linears
from hooked_llava.model.hooked_module import HookedModule
from hooked_llava.options.needs import NEEDS, Need
from hooked_llava.options.patchscopes import IDENTITY
from hooked_llava.options.support import needs_of_calls
from hooked_llava.prompt import requirements as of_prompts
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike

_SHOWN = 3


def supported_inputs(call: str, model: HookedModule, inputs: InputsLike) -> Inputs:
    """The prompts as the model takes them; raises `InputError` as `check_supported`."""
    prompts = model.as_inputs(inputs)
    check_supported(call, model, prompts)
    return prompts


def check_supported(call: str, model: HookedModule, inputs: Inputs | None = None) -> None:
    """Raise `InputError` for the first need of a call (see `options.support`) that model or prompts do not meet."""
    require(needs_of_calls()[call], call, model, inputs)


def missing_for(call: str, model: HookedModule, inputs: Inputs | None = None) -> str | None:
    """What a call is refused for; None where it is supported. Without inputs only the model is asked."""
    return _first_missing(needs_of_calls()[call], model, inputs)


def require(needs: Iterable[Need], what: str, model: HookedModule, inputs: Inputs | None = None) -> None:
    """Raise `InputError` for the first of some needs that is not met; `what` is who needs it."""
    if missing := _first_missing(needs, model, inputs):
        raise InputError(f"{what} {missing}")


def missing_for_all(model: HookedModule, inputs: Inputs | None = None) -> dict[str, str | None]:
    """What each call is refused for, as `missing_for` says it; every need is asked once."""
    missing = {need: _missing(need, model, inputs) for need in NEEDS}
    return {call: next(filter(None, map(missing.get, needs)), None) for call, needs in needs_of_calls().items()}


def _first_missing(needs: Iterable[Need], model: HookedModule, inputs: Inputs | None = None) -> str | None:
    return next(filter(None, (_missing(need, model, inputs) for need in needs)), None)


def _missing(need: Need, model: HookedModule, inputs: Inputs | None) -> str | None:
    if need in OF_MODEL:
        return OF_MODEL[need](model)
    return None if inputs is None else OF_PROMPTS[need](inputs)


def processor(model: HookedModule) -> str | None:
    """Of what turns text or images into inputs, or tokens into text."""
    return of_prompts.without_processor(model.no_processor) if model.processor is None else None


def identity_prompt(model: HookedModule) -> str | None:
    """Of a patchscope without a target prompt of its own."""
    if model.processor is None:
        return processor(model)
    unknown = getattr(model.tokenizer, "unk_token_id", None)
    if unknown is None or unknown not in model.tokenizer(IDENTITY)["input_ids"]:
        return None
    return (
        f"needs a tokenizer that can say the identity prompt {IDENTITY!r}, and that of {model.config.model_name} cannot; give "
        "target=, a prompt of its own words, and target_position=."
    )


def separate_mlps(model: HookedModule) -> str | None:
    """Of what changes what an MLP reads, and not what the heads beside it read."""
    if not model.config.language.parallel_attn_mlp:
        return None
    return (
        f"needs MLPs with an input of their own, and {SIDE_BY_SIDE}. Use edge_attribution for estimates, and path_patching "
        "with 'logits', 'q', 'k' and 'v' as receivers."
    )


def floating_point(model: HookedModule) -> str | None:
    """Of what adds to weights: what is added to one in 8 or 4 bits would be lost in rounding."""
    packed = quantized_linears(model)
    if not packed:
        return None
    path, linear = next(iter(packed.items()))
    return (
        f"needs weights in floating point, and those of {model.config.model_name!r} are quantized ({len(packed)} matrices, "
        f"such as {path} in {linear.bits} bits). Load it without quantization_config, or the checkpoint that was quantized "
        '(dtype="bfloat16" takes half of float32\'s memory).'
    )


def no_functions(model: HookedModule) -> str | None:
    """Of what runs on parts of the prompt, or computes with the model as it is."""
    modules = {name.removeprefix("language."): module for name, module in model.named_modules()}
    names = [name for name, module in {**modules, **model.hook_dict}.items() if has_functions(module)]
    if not names:
        return None
    return (
        f"needs a model without functions. Functions are attached to {', '.join(names[:_SHOWN])}"
        f"{' and more' if len(names) > _SHOWN else ''}: remove them (model.reset_hooks()), or give them to a re-run as "
        "interventions."
    )


def hf_config(model: HookedModule) -> str | None:
    """Of what writes a checkpoint."""
    if model.hf_config is not None:
        return None
    return (
        "needs the Hugging Face config that the model was built without. Pass hf_config= to build, or load the model with "
        "from_pretrained or from_hf."
    )


def _span(name: str) -> Callable[[Inputs], str | None]:
    """Of what names a span that a prompt has or has not."""

    def missing(inputs: Inputs) -> str | None:
        try:
            inputs.each(lambda token_map: token_map[name], inputs.token_maps)
        except SpanError as error:
            return str(error)
        return None

    return missing


OF_MODEL: dict[Need, Callable[[HookedModule], str | None]] = {
    "processor": processor,
    "identity_prompt": identity_prompt,
    "separate_mlps": separate_mlps,
    "floating_point": floating_point,
    "no_functions": no_functions,
    "hf_config": hf_config,
}
"""What is missing of the model, or None."""
OF_PROMPTS: dict[Need, Callable[[Inputs], str | None]] = {
    "one_prompt": lambda inputs: of_prompts.one_prompt(len(inputs)),
    "an_image": lambda inputs: of_prompts.an_image(inputs.n_images),
    "images_alike": lambda inputs: of_prompts.images_alike(inputs.images_per_prompt),
    "one_image": lambda inputs: of_prompts.one_image(inputs.images_per_prompt),
    "original_image": lambda inputs: of_prompts.original_image(inputs.images),
    "originals_known": lambda inputs: of_prompts.original_image(inputs.images) if inputs.n_images else None,
    "words_known": lambda inputs: (
        None if all(m.words is not None for m in inputs.token_maps) else of_prompts.WORDS_UNKNOWN
    ),
    "image_span": _span("image"),
    "question_span": _span("question"),
}
"""What is missing of some prompts, or None; token maps and sizes are asked, no tensor is read."""
