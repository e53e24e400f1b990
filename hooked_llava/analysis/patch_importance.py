"""Which patches of the image decide the answer?

The log-probability increase (Yu & Ananiadou, arXiv 2411.10950) asks what each patch's part of a head's output adds
at the answer's position; it costs one forward pass. The other methods are what it is to be compared with; occlusion is the
only one that takes the patch away and looks.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import xarray as xr
from jaxtyping import Float
from torch import Tensor

from hooked_llava.analysis.maps.scores import Heads, check_choice
from hooked_llava.analysis.maps.sinks import sink_positions, without_sinks_of
from hooked_llava.architecture.layout import ALL
from hooked_llava.checks import one_of
from hooked_llava.errors import InputError
from hooked_llava.model.requirements import check_supported
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.readout.answer import AnswerReading, unwrap_single
from hooked_llava.readout.answer_cache import AnswerCache, Asked, prompts_of, read_token
from hooked_llava.readout.answer_tokens import Target, per_prompt
from hooked_llava.results.arrays import stack, to_numpy
from hooked_llava.results.image_axes import ImageAxes
from hooked_llava.results.provenance import provenance

if TYPE_CHECKING:
    from hooked_llava.model.llava import HookedLLaVA


_WHOLE = ("grid", ALL)  # the default, which goes without saying


def patch_importance(
    model: HookedLLaVA,
    inputs: Any,
    target: Target = None,
    *,
    token: int | None = None,
    method: str = "log_increase",
    heads: Heads | None = None,
    vision: bool = False,
    layer: int | None = None,
    steps: int = 16,
    window: int = 1,
    grid: str = ALL,
    fill: Float[Tensor, " d_model"] | None = None,
    without_sinks: bool = False,
) -> xr.DataArray:
    """How much every patch matters for the answer, [image, patch_row, patch_col]; several prompts give a first axis prompt.

    For images of several grids, [image, feature]: see `results.image_axes`.

    Args:
        model: the model.
        inputs: prompts with equally many images each, anything `model.as_inputs` takes. For "log_increase" and
            "attention" also a `AnswerCache` of them (`hooked_llava.readout.cache_answer`), which brings its own target.
        target: answer that is scored; the model's own next token by default. Text of several tokens is scored under
            teacher forcing; a list has one word for each prompt.
        token: which of the answer's tokens alone, from 0 (from the end where negative); all together by default.
        method: one of the names in `hooked_llava.options.patch_maps.PATCH_MAPS`, where each says what it shows.
        heads: for "log_increase" and "attention": how many of the heads with the largest scores, "all", or (layer, head) pairs.
            "log_increase" sums over them, by default the best one (the paper's tool), or with "all" over the layers, each with
            all its heads together; "attention" takes their mean, by default of all.
        vision: carry on through the vision tower to the pixels and patches; for "grad_cam": look inside the vision tower.
        layer: for "grad_cam": which layer's residual stream, as it enters it; the last one's by default.
        steps: points of the path, for "integrated_gradients".
        window: side in patches of the square that is blanked, for "occlusion" and "token_ablation".
        grid: for "occlusion" the grid in whose tiles what a patch shows is blanked; "all" of them by default.
        fill: what takes the place of an image embedding, for "token_ablation".
        without_sinks: leave out (NaN) what `sink_positions` finds, in one more forward pass.

    Positive numbers speak for the answer (attention and rollout do not know for or against). Attributes: `target`,
    `units`, `n_forward`, `n_backward`, and `heads` or `layer` where some were chosen. Raises `InputError` for prompts without
    images, for options that the method does not have, and for targets that do not fit.

    >>> from hooked_llava import HookedLLaVA
    >>> from hooked_llava.toy.images import image_path, image_scene
    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> inputs = model.prepare("What color is the star?", images=image_path("demo"))
    >>> importance = patch_importance(model, inputs)
    >>> row, column = divmod(int(importance.values.argmax()), 8)
    >>> star = inputs.token_map.box_to_patches(image_scene("demo").find("star").box, coverage=0.2)
    >>> inputs.token_map.patch_to_position(row, column) in star
    True
    """
    given = {"heads": heads, "vision": vision, "layer": layer, "steps": steps, "window": window}
    given |= {"grid": grid, "fill": fill}
    maps = _maps(model, inputs, target, token, method, _options(model, method, given))
    return without_sinks_of(maps, sink_positions(model, prompts_of(model, inputs))) if without_sinks else maps


def _maps(
    model: HookedLLaVA, inputs: Any, target: Target, token: int | None, method: str, options: dict[str, Any]
) -> xr.DataArray:
    """The maps of all prompts, together or one by one."""
    how = PATCH_MAPS[method]
    if isinstance(inputs, AnswerCache) and not how.takes_cache:
        raise InputError(f"method={method!r} runs the model itself; give it the prompts, not an AnswerCache.")
    prompts = prompts_of(model, inputs)
    check_supported(f"patch_importance(method={method!r})", model, prompts)
    axes = ImageAxes.of(prompts)
    if how.one_prompt and len(prompts) > 1:
        apart = zip(prompts, per_prompt(target, len(prompts)), strict=True)
        each = [_importance(model, p, t, token, method, options, axes).isel(prompt=0, drop=True) for p, t in apart]
        return stack(each, "prompt")
    result = _importance(model, inputs if how.takes_cache else prompts, target, token, method, options, axes)
    return result if len(prompts) > 1 else result.isel(prompt=0, drop=True)


def _options(model: HookedLLaVA, method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's own options; raises `InputError` if others were given, and for heads that are not there."""
    one_of(method, PATCH_MAPS, "method")
    own = PATCH_MAPS[method].options
    default = {name: parameter.default for name, parameter in signature(patch_importance).parameters.items()}
    if foreign := [name for name, value in given.items() if name not in own and value is not default[name]]:
        takes = f"; it takes {', '.join(own)}" if own else ""
        raise InputError(f"method={method!r} has no option {', '.join(foreign)}{takes}.")
    heads = given["heads"]
    given = given | {"heads": None if heads is None else check_choice(model, heads)}
    return {name: given[name] for name in own}


def _importance(
    model: HookedLLaVA,
    inputs: Any,
    target: Asked,
    token: int | None,
    method: str,
    options: dict[str, Any],
    axes: ImageAxes,
) -> xr.DataArray:
    if token is not None and isinstance(inputs, AnswerCache):
        inputs = inputs.of_token(token)
    elif token is not None:
        assert not isinstance(target, AnswerReading)
        target = read_token(model, inputs, target, token)
    told_apart = ("heads", "layer", "fill")
    said = {name: value for name, value in options.items() if name not in told_apart and (name, value) != _WHOLE}
    said |= {} if token is None else {"token": token}
    said["units"] = PATCH_MAPS[method].units
    prompts = prompts_of(model, inputs)
    with provenance("patch_importance", model, prompts, n_forward=1, method=method, **said) as made:
        found = PATCH_MAPS[method].draw(model, inputs, target, **options)
        attrs = found.target | {"n_backward": found.n_backward}
        attrs |= found.chosen | ({} if found.heads is None else {"heads": unwrap_single(found.heads)})
        attrs = made.attrs(**attrs) | {"n_forward": found.n_forward}
        return axes.labelled(
            to_numpy(found.maps), ("prompt", "image"), layouts=prompts.layouts, name=method, attrs=attrs
        )
