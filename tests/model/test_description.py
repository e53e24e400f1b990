"""What `model.describe` says against what every call does: supported if and only if it does not raise, with its reason."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from typing import Any, get_args

import pytest
import torch
import xarray as xr
from transformers import BitsAndBytesConfig

from hooked_llava import Replay, analysis, editing, experiments, steering
from hooked_llava.errors import HookedLLaVAError, HookNameError, InputError
from hooked_llava.model.language import LanguageTower
from hooked_llava.model.llava import HookedLLaVA
from hooked_llava.model.projector import Projector
from hooked_llava.model.requirements import OF_MODEL, OF_PROMPTS
from hooked_llava.model.vision import VisionTower
from hooked_llava.options.needs import NEEDS, Need
from hooked_llava.options.patch_maps import PATCH_MAPS
from hooked_llava.options.support import needs_of_calls
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.readout.metrics import log_probability
from hooked_llava.results.image_axes import ImageAxes
from hooked_llava.sae import SAEConfig, SparseAutoencoder, feature_attribution
from tests.analyses import LANGUAGES, TILED, hf_of, image, model_of, prompts
from tests.pretend_device import accelerators

ANSWER, OTHER = 20, 21
BOX, THERE = (0, 0, 8, 8), (9, 9, 17, 17)


@dataclass(frozen=True)
class Case:
    """A model, and two prompts that may be compared."""

    model: HookedLLaVA
    clean: Inputs
    other: Inputs
    asked: str = field(default="What is the circle?", kw_only=True)


def calls(case: Case, folder: Any) -> dict[str, Callable[[], Any]]:
    """Every call of the list, with arguments that are right wherever it is supported."""
    model, x, other = case.model, case.clean, case.other
    metric, a, e = log_probability(ANSWER), analysis, experiments
    vector = torch.ones(model.cfg.d_model)
    sae = SparseAutoencoder(SAEConfig(d_in=model.cfg.d_model, d_sae=8, k=2, hook="blocks.0.hook_resid_post")).reset(
        seed=0
    )
    last, size = x.shape[1] - 1, next((layout.original_size for layout in x.layouts), None) or (24, 24)
    words = experiments.Replace("circle")
    return {
        "prepare": lambda: model.prepare("What is the star?"),
        "generate": lambda: model.generate(x, max_new_tokens=1),
        "save_pretrained": lambda: model.save_pretrained(folder),
        "Replay": lambda: Replay(model, x),
        "ablate_heads": lambda: a.ablate_heads(model, x, [(0, 1)], replace="zero"),
        "activation_patching": lambda: a.activation_patching(
            model, x, other, positions="last", metric=metric, layers=1
        ),
        "activation_patching(hook='hook_image_embed')": lambda: a.activation_patching(
            model, x, other, hook="hook_image_embed", positions="all", metric=metric
        ),
        "answer_maps": lambda: a.answer_maps(model, x, [ANSWER]),
        "answer_probability": lambda: a.answer_probability(model, x),
        "answer_signs": lambda: a.answer_signs(model, x, by_prompt(x), by_prompt(x)),
        "answer_without": lambda: a.answer_without(model, x, ANSWER, heads=[(0, 1)]),
        "answer_without(patches=...)": lambda: a.answer_without(model, x, ANSWER, patches=some_map(x)),
        "attention_contribution": lambda: a.attention_contribution(model, x, [last - 1]),
        "attention_contribution(constraint='words')": lambda: a.attention_contribution(model, x, "star"),
        "attention_knockout": lambda: a.attention_knockout(model, x, ["text->last"], 1, centers=[1]),
        "attention_knockout(edges='image->last')": lambda: a.attention_knockout(
            model, x, "image->last", 1, centers=[1]
        ),
        "attention_knockout(edges='question->last')": lambda: a.attention_knockout(
            model, x, "question->last", 1, centers=[1]
        ),
        "attribution_patching": lambda: a.attribution_patching(model, x, other, metric=metric, hooks=["z"]),
        "causal_trace": lambda: a.causal_trace(model, x, [last - 1], answer=ANSWER, layers=[1], kinds=["mlp"]),
        "causal_trace(constraint='words')": lambda: a.causal_trace(
            model, x, "star", answer=ANSWER, layers=[1], kinds=["mlp"]
        ),
        "causal_trace(corruption='words')": lambda: a.causal_trace(
            model, x, [last - 2], corruption=words, answer=ANSWER, layers=[1], kinds=["mlp"]
        ),
        "deletion_curves": lambda: a.deletion_curves(model, x, {"one": some_map(x).isel(image=0)}, shares=(0, 1)),
        "edge_attribution": lambda: a.edge_attribution(model, x, other, metric=metric),
        "faithfulness_curve": lambda: a.faithfulness_curve(
            model, x, other, a.edge_attribution(model, x, other, metric=metric), [2], metric=metric, n_random=0
        ),
        "head_readings": lambda: a.head_readings(model, x, 1, 1, ANSWER, k=2),
        "head_scores": lambda: a.head_scores(model, x, ANSWER),
        "heads_by_attention": lambda: a.heads_by_attention(model, x, "text"),
        "heads_by_attention(span='image')": lambda: a.heads_by_attention(model, x),
        "image_attention": lambda: a.image_attention(model, x),
        "information_storage": lambda: a.information_storage(model, x, ANSWER, OTHER, top=1),
        "layer_scores": lambda: a.layer_scores(model, x, ANSWER),
        "logit_attribution": lambda: a.logit_attribution(model, x, ANSWER),
        "logit_attribution(by='patch')": lambda: a.logit_attribution(model, x, ANSWER, by="patch"),
        "logit_lens": lambda: a.logit_lens(model, x, k=1),
        "neuron_scores": lambda: a.neuron_scores(model, x, ANSWER, top=1, layers=[1]),
        "next_tokens": lambda: a.next_tokens(model, x, k=1),
        "output_knockout": lambda: a.output_knockout(model, x, "mlp at last", 1),
        "output_knockout(outputs='mlp at question')": lambda: a.output_knockout(model, x, "mlp at question", 1),
        "patch_importance": lambda: a.patch_importance(model, x, ANSWER),
        **{
            f"patch_importance(method={name!r})": functools.partial(a.patch_importance, model, x, ANSWER, method=name)
            for name in PATCH_MAPS
        },
        "patchscope": lambda: a.patchscope(
            model, x, target=other[0], target_position="last", layers=[1], max_new_tokens=1
        ),
        "patchscope(target=None)": lambda: a.patchscope(model, x, layers=[1], max_new_tokens=1),
        "path_patching": lambda: a.path_patching(model, x, other, metric=metric, senders="mlps"),
        "path_patching(receivers='mlp')": lambda: a.path_patching(
            model, x, other, metric=metric, senders="mlps", receivers=[("mlp", 1)]
        ),
        "position_scores": lambda: a.position_scores(model, x, ANSWER),
        "sink_positions": lambda: a.sink_positions(model, x),
        "blank_image": lambda: e.blank_image(model, x),
        "gaussian_noise": lambda: e.gaussian_noise(model, x, "last"),
        "other_image": lambda: e.other_image(model, x, other),
        "other_image(pool=images)": lambda: e.other_image(model, x, [image(7, size)]),
        "other_question": lambda: e.other_question(model, x, [case.asked]),
        "swapped_objects": lambda: e.swapped_objects(model, x, BOX, THERE),
        "without_object": lambda: e.without_object(model, x, BOX),
        "multedit": lambda: editing.multedit(model, edit(x), layer=1, position="last", steps=1),
        "multedit(constraint='words')": lambda: editing.multedit(
            model, edit(x, "star"), layer=0, position="constraint", steps=1
        ),
        "rome": lambda: editing.rome(
            model, edit(x), editing.key_covariance(model, [x], layer=1), position="last", steps=1
        ),
        "memit": lambda: editing.memit(
            model, edit(x), editing.key_covariances(model, [x], [1]), position="last", steps=1
        ),
        "finetune": lambda: editing.finetune(model, edit(x), layers=1, steps=1),
        "edit_sweep": lambda: editing.edit_sweep(model, edit(x), positions=["last"], trace=None, steps=1),
        "key_covariance": lambda: editing.key_covariance(model, [x], layer=1),
        "key_covariances": lambda: editing.key_covariances(model, [x], [1]),
        "keep_prompts": lambda: editing.keep_prompts(model, x),
        "steering_sweep": lambda: steering.steering_sweep(
            model, x, vector, [0], answer=ANSWER, hook="blocks.0.hook_resid_post", controls=[]
        ),
        "mean_difference": lambda: steering.mean_difference(model, x, other, hook="blocks.1.hook_resid_post"),
        "feature_attribution": lambda: feature_attribution(model, sae, x, ANSWER, any_model=True),
    }


def by_prompt(x: Inputs) -> xr.DataArray:
    """A map of every patch of all prompts, where there are some."""
    if len(set(x.images_per_prompt)) != 1 or not x.n_images:
        return xr.DataArray(torch.rand(1, 2, 2).numpy(), dims=("image", "patch_row", "patch_col"))
    axes = ImageAxes.of(x)
    values = torch.rand(len(x), x.images_per_prompt[0], *axes.shape).numpy()
    found = xr.DataArray(values, dims=("prompt", "image", *axes.dims))
    return found[0] if len(x) == 1 else found


some_map = by_prompt


def edit(x: Inputs, constraint: str | None = None) -> editing.EditRequest:
    return editing.EditRequest(x, OTHER, constraint=constraint)


# ---------------------------------------------------------------------- models and prompts


def as_ids(model: HookedLLaVA, x: Inputs) -> Inputs:
    """A prompt as a processor returns it: without its words' places and the image itself."""
    names = ("input_ids", "attention_mask", "pixel_values")
    return model.as_inputs({name: getattr(x, name) for name in names})


def asked(*n_images: int, question: str = "What is the star?", seed: int = 0) -> Inputs:
    """A prompt for each number, about so many images."""
    images = [[image(seed + i) for i in range(n)] for n in n_images]
    model = model_of("llama-clip")
    return model.prepare([question] * len(n_images), images=images if any(n_images) else None)


@contextmanager
def with_function(model: HookedLLaVA) -> Iterator[None]:
    with model.hooks([("blocks.1.hook_resid_post", lambda x, hook: None)]):
        yield


@contextmanager
def with_reconstruction(model: HookedLLaVA) -> Iterator[None]:
    sae = SparseAutoencoder(SAEConfig(d_in=model.cfg.d_model, d_sae=8, k=2)).reset(seed=0)
    with model.attach_sae(sae, "blocks.1.hook_resid_post", keep_error=False):
        yield


def of_family(name: str) -> Case:
    return Case(model_of(name), *prompts(name))


def without_processor() -> Case:
    model = HookedLLaVA.from_hf(hf_of("llama-clip"))
    return Case(model, *(as_ids(model, x) for x in prompts("llama-clip")))


def ids_alone() -> Case:
    model = model_of("llama-clip")
    return Case(model, *(as_ids(model, x) for x in prompts("llama-clip")))


def of_images(*n_images: int) -> Case:
    return Case(model_of("llama-clip"), asked(*n_images), asked(*n_images, question="What is the circle?", seed=5))


def quantized() -> Case:
    case = of_family("llama-clip")
    with TemporaryDirectory() as folder:
        hf_of("llama-clip").save_pretrained(folder)
        model = HookedLLaVA.from_pretrained(folder, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    model.processor = case.model.processor
    return Case(model, case.clean, case.other)


def built_without_config() -> Case:
    case = of_family("llama-clip")
    model = HookedLLaVA.build(case.model.config, processor=case.model.processor)
    model.load_state_dict(case.model.state_dict())
    return Case(model, case.clean, case.other)


CASES: dict[str, Callable[[], Case]] = {
    **{name: functools.partial(of_family, name) for name in (*LANGUAGES, *TILED)},
    "no processor": without_processor,
    "token ids": ids_alone,
    "no image": functools.partial(of_images, 0),
    "two images": functools.partial(of_images, 2),
    "two prompts": functools.partial(of_images, 1, 1),
    "unequal prompts": functools.partial(of_images, 2, 1),
    "one without an image": functools.partial(of_images, 1, 0),
    "8 bits": quantized,
    "no config": built_without_config,
    "a function": functools.partial(of_family, "llama-clip"),
    "a reconstruction": functools.partial(of_family, "llama-clip"),
}
ATTACHED = {"a function": with_function, "a reconstruction": with_reconstruction}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CASES)
def test_supported_means_that_the_call_does_not_raise_and_the_reason_is_in_its_error(name: str, tmp_path: Any) -> None:
    case = CASES[name]()
    with ATTACHED[name](case.model) if name in ATTACHED else nullcontext():
        description = case.model.describe(case.clean)
        wrong = {}
        for call, run in calls(case, tmp_path / "model").items():
            reason, raised = description.reason(call), None
            try:
                run()
            except (HookedLLaVAError, editing.TargetNotReached) as error:
                raised = str(error)
            if (reason is None) != (raised is None) or (reason or "") not in (raised or ""):
                wrong[call] = (reason, raised)
    assert not wrong


# ---------------------------------------------------------------------- the list


PROMPTS_FIRST = ("inputs", "clean", "request", "requests", "prompts", "positive")
"""What the argument after the model is called of functions that are given prompts, not a table of questions."""


def test_every_call_of_the_list_is_called_and_every_public_function_of_prompts_is_in_it(tmp_path: Any) -> None:
    assert set(calls(of_family("llama-clip"), tmp_path)) == set(needs_of_calls())
    for room in (analysis, editing, experiments, steering):
        functions = {name: getattr(room, name) for name in room.__all__ if inspect.isfunction(getattr(room, name))}
        first = {name: [*inspect.signature(one).parameters][:2] for name, one in functions.items()}
        of_prompts = [name for name, own in first.items() if own[0] == "model" and own[-1] in PROMPTS_FIRST]
        assert set(of_prompts) - {"prompt_pairs", "sequential_edits"} <= set(needs_of_calls()), room.__name__
        assert len(of_prompts) > 0
    assert {call.partition("(")[0] for call in needs_of_calls()} <= set(needs_of_calls()), (
        "an option of a call that is not there"
    )


def test_every_need_has_a_meaning_a_check_and_a_call() -> None:
    used = {need for needs in needs_of_calls().values() for need in needs}
    assert set(get_args(Need)) == set(NEEDS) == {*OF_MODEL, *OF_PROMPTS} == used


# ---------------------------------------------------------------------- what it says


@pytest.mark.parametrize("name", ["phi-siglip", "llama-clip"])
def test_hooks_that_are_lacking_are_refused_with_the_same_words(name: str) -> None:
    model = model_of(name)
    lacks = model.describe().lacks
    assert [one.names[0] for one in lacks] == {
        "phi-siglip": ["resid_mid", "pre_linear", "vision.ln_post", "vision.ln_pre"],
        "llama-clip": ["vision.blocks.2.", "vision.ln_post"],
    }[name]
    token = "no" if "siglip" in name else "a"
    assert f"{token} class token" in str(model.describe())
    for one in lacks:
        for part in one.names:
            assert not [hook for hook in model.hook_dict if hook in one]
            with pytest.raises(HookNameError) as raised:
                model.hooks_table.resolve(f"{part}hook_resid_pre" if part.endswith(".") else part)
            assert one.why in str(raised.value)
            assert part.rstrip(".") in str(model.describe())


def test_nothing_runs_and_nothing_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a forward pass")

    with accelerators() as device:
        model = HookedLLaVA.from_pretrained("tiny-shapes", device="cuda:0")
        inputs = model.prepare(["What color is the star?", "Who?"], images=[image(0, (64, 64)), image(1, (64, 64))])
        for part in (HookedLLaVA, LanguageTower, VisionTower, Projector, torch.nn.Linear):
            monkeypatch.setattr(part, "forward", refuse)
        device.waits.clear()
        moves = device.moves
        described = str(model.describe(inputs))
        assert not device.waits
        assert device.moves == moves
    assert "cuda:0" in described


def test_what_it_prints_of_prompts_grids_spans_and_padding() -> None:
    model = model_of("llava_next")
    images = [image(0, (24, 100)), image(1, (24, 24))]
    inputs = model.prepare(["What is the star?", "What?"], images=images)
    text = " ".join(str(model.describe(inputs)).split())  # however it is wrapped
    layouts = [
        " + ".join(f"{g.name} {g.rows.cells} x {g.columns.cells}" for g in one.layouts[0].grids) for one in inputs
    ]
    for row, (one, grids) in enumerate(zip(inputs.token_maps, layouts, strict=True)):
        _, _, own = text.partition(f"prompt {row}: {len(one.real)} positions")
        padding, at = len(one) - len(one.real), f"{one['image'][0]}..{one['image'][-1]}"
        padded = f", {padding} more of padding on the left" if padding else ""
        n_tiles, (height, width) = one.layouts[0].n_tiles, images[row].size[::-1]
        assert own.startswith(
            f"{padded} image 0 at {at}: {grids} patches of {n_tiles} tiles; original {height} x {width} pixels"
        )
        assert f"question {one['question'][0]}" in own
    assert "more of padding" in text


def test_an_image_outside_the_sliding_window_is_told_from_attention_that_was_measured_zero() -> None:
    windowed, plain = of_family("mistral-clip"), of_family("llama-clip")
    assert "outside the 5 positions that the last one sees in layers 0..2" in str(
        windowed.model.describe(windowed.clean)
    )
    assert not analysis.image_attention(windowed.model, windowed.clean).any()
    assert "outside the" not in str(plain.model.describe(plain.clean))
    assert analysis.image_attention(plain.model, plain.clean).all()


def test_what_it_prints_without_prompts_and_with_an_autoencoder() -> None:
    model = model_of("phi-clip")
    with with_reconstruction(model):
        text = str(model.describe())
    assert "autoencoder at blocks.1.hook_resid_post: 8 features" in text
    assert text.index("not supported") < text.index("faithfulness_curve, path_patching(receivers='mlp')")
    assert f"{NEEDS['one_prompt']}\n    answer_maps" in text
    assert model.describe().supports("patch_importance")
    assert not model.describe(model.prepare("What is it?")).supports("patch_importance")
    with pytest.raises(InputError, match=r"call='patch_importanc'.*patch_importance"):
        model.describe().supports("patch_importanc")
