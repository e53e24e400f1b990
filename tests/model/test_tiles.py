"""LLaVA-NeXT and LLaVA-OneVision: Hugging Face's numbers for images of any size, every hook, files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.errors import ConfigError, InputError
from hooked_llava.loading.embedded import resolve
from hooked_llava.model.cache_hooks import axis_sizes
from hooked_llava.model.llava import HookedLLaVA
from tests.pairs import assert_as_near_as_theirs, rounding_errors
from tests.tiled import KINDS, SQUARE, TALL, WIDE, both, hf_config, make_hf, make_prompts

EVERY = pytest.mark.parametrize("kind", KINDS)
PROMPTS = {
    "text": [[]],
    "one image": [[WIDE]],
    "several in a row": [[TALL, WIDE, SQUARE]],
    "across rows": [[WIDE], [TALL], [SQUARE]],
    "with and without": [[], [WIDE], [], [TALL, SQUARE]],
}


@EVERY
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("prompts", PROMPTS.values(), ids=PROMPTS)
def test_every_layer_equals_hugging_face(kind: str, prompts: list, side: str) -> None:
    ours, theirs = both(kind)
    table = ours.verify(theirs, make_prompts(kind, *prompts, padding_side=side))
    assert table.ok, str(table)
    assert len(table.rows) == (4 if prompts == [[]] else 4 + 1 + ours.config.vision.n_layers_run + 2)


@EVERY
@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize("language", ["llama", "mistral", "qwen2", "phi"])
def test_every_combination_of_parts_equals_hugging_face(kind: str, language: str, tower: str) -> None:
    ours, theirs = both(kind, language, tower)
    table = ours.verify(theirs, make_prompts(kind, [TALL], [WIDE, SQUARE], []))
    assert table.ok, str(table)


@EVERY
def test_bfloat16_is_as_near_to_float32_as_hugging_face_is(kind: str) -> None:
    found = []
    for seed in range(3):
        exact, rounded = make_hf(kind, seed), make_hf(kind, seed, dtype=torch.bfloat16)
        prompts = make_prompts(kind, [WIDE], [TALL, SQUARE], n_text=20, seed=seed)
        found.append(rounding_errors(exact, rounded, prompts))
    assert_as_near_as_theirs(found)


@EVERY
def test_a_padded_row_equals_the_prompt_alone(kind: str) -> None:
    ours, _ = both(kind)
    batch = ours.as_inputs(make_prompts(kind, [WIDE], [], [TALL, SQUARE], padding_side="right"))
    logits = ours(batch)
    for row, alone in enumerate(batch):
        real = alone.token_map.real
        torch.testing.assert_close(
            ours(input_ids=alone.input_ids[:, real.start : real.stop], **alone.image_fields)[0],
            logits[row, real.start : real.stop],
            rtol=1e-4,
            atol=1e-4,
        )


@EVERY
@pytest.mark.parametrize("prompts", [[[WIDE]], [[], [TALL], [WIDE, SQUARE]]])
def test_greedy_generation_equals_hugging_face(kind: str, prompts: list) -> None:
    ours, theirs = both(kind)
    fields = make_prompts(kind, *prompts)
    expected = theirs.generate(**fields, max_new_tokens=5, do_sample=False, eos_token_id=[], pad_token_id=0)
    found = ours.generate(fields, max_new_tokens=5, return_type="tokens", stop_at_eos=False)
    assert torch.equal(found, expected[:, fields["input_ids"].shape[1] :])


@EVERY
def test_every_hook_fires_in_its_shape(kind: str) -> None:
    ours, _ = both(kind)
    inputs = ours.as_inputs(make_prompts(kind, [TALL], [WIDE], []))
    _, cache = ours.run_with_cache(inputs, names_filter=lambda name: True)
    assert list(cache.keys()) == ours.hooks_table.names
    for name, tensor in cache.items():
        sizes = axis_sizes(ours.hooks_table, name, inputs)
        assert list(tensor.shape) == [sizes[axis] for axis in ours.hooks_table[name].axes], name
    assert len(cache["vision.hook_embed"]) == sum(len(tiles) for tiles in inputs.tiles) > inputs.n_images


@EVERY
def test_what_fills_up_a_shorter_image_is_zero_and_goes_nowhere(kind: str) -> None:
    ours, _ = both(kind)
    inputs = ours.as_inputs(make_prompts(kind, [TALL], [SQUARE]))
    shorter = min(range(2), key=lambda image: inputs.layouts[image].n_features)
    n = inputs.layouts[shorter].n_features
    logits, cache = ours.run_with_cache(inputs, names_filter="hook_image_embed")
    assert cache["hook_image_embed"].shape[1] > n
    assert cache["hook_image_embed"][shorter, n:].eq(0).all()

    def write(tensor: torch.Tensor, hook: object) -> None:
        tensor[shorter, n:] = 100.0

    assert torch.equal(ours.run_with_hooks(inputs, fwd_hooks=[("hook_image_embed", write)]), logits)


@EVERY
def test_saved_and_loaded_by_both(kind: str, tmp_path: Path) -> None:
    theirs = make_hf(kind, seed=3)
    ours = HookedLLaVA.from_hf(theirs)
    fields = make_prompts(kind, [WIDE])
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    logits = ours(fields)
    for folder in ("ours", "theirs"):
        assert torch.equal(HookedLLaVA.from_pretrained(tmp_path / folder)(fields), logits)
    again = AutoModelForImageTextToText.from_pretrained(resolve(tmp_path / "ours"))
    assert torch.equal(again.model.image_newline, theirs.model.image_newline)
    assert ours.verify(again.eval(), fields).ok


@EVERY
def test_a_random_prompt_is_made_up_for_verification(kind: str) -> None:
    ours, theirs = both(kind)
    assert ours.verify(theirs).ok


@EVERY
def test_what_a_processor_returns_is_taken_in_every_form(kind: str) -> None:
    ours, _ = both(kind)
    fields = make_prompts(kind, [TALL], [WIDE])
    logits = ours(fields)
    assert torch.equal(ours(**fields), logits)
    torch.testing.assert_close(
        ours.run_with_cache(**fields)[0], logits, rtol=1e-5, atol=1e-5
    )  # the pattern is computed
    assert torch.equal(ours.run_with_hooks(**fields), logits)
    inputs = ours.as_inputs(fields)
    assert torch.equal(ours({**fields, **inputs.image_fields}), logits)  # tiles one after the other
    assert torch.equal(ours(inputs[1]), ours(as_alone(inputs, 1)))
    with pytest.raises(InputError, match="videos.*images"):
        ours({**fields, "pixel_values_videos": torch.zeros(1)})


def as_alone(inputs, row: int):
    """One row as fields."""
    one = inputs[row]
    return {"input_ids": one.input_ids, "attention_mask": one.attention_mask, **one.image_fields}


@EVERY
def test_images_that_do_not_fit(kind: str) -> None:
    ours, _ = both(kind)
    fields = make_prompts(kind, [TALL], [WIDE])
    for wrong, message in (
        ({"image_sizes": None}, "pixel_values.* without image_sizes"),
        ({"image_sizes": fields["image_sizes"].flip(0)}, r"Prompt 0.*\d+ <image> tokens.*position \d+"),
        ({"image_sizes": fields["image_sizes"][:1], "batch_num_images": None}, r"pixel_values have shape \[2, \d, 3"),
        ({"image_sizes": fields["image_sizes"].float()}, r"image_sizes are float32; expected integers"),
        ({"image_sizes": fields["image_sizes"] * 0}, r"image_sizes.*\[2, 2\].* 0"),
        ({"pixel_values": None}, r"(?s)Prompt \d.*<image>.*no image"),
        ({"pixel_values": fields["pixel_values"][:, :2]}, r"pixel_values have shape \[2, 2, 3"),
        ({"pixel_values": fields["pixel_values"][0]}, r"expected \d tiles"),
        ({"batch_num_images": torch.tensor([3])}, r"batch_num_images are \[3\]"),
    ):
        with pytest.raises(InputError, match=message):
            ours({**fields, **wrong})


def test_inputs_of_another_geometry_are_refused() -> None:
    inputs = both("next")[0].as_inputs(make_prompts("next", [WIDE]))
    other = HookedLLaVA.from_hf(make_hf("next", image_grid_pinpoints=[[112, 112]]))
    with pytest.raises(InputError, match=r"\d+ positions per image.*has \d+.*prepare\("):
        other(inputs)


@pytest.mark.parametrize(("kind", "tower", "strategy"), [("next", "clip", "full"), ("onevision", "siglip", "default")])
def test_features_that_make_no_grid_are_refused(kind: str, tower: str, strategy: str) -> None:
    with pytest.raises(ConfigError, match=r"vision_feature_select_strategy.*transformers"):
        LLaVAConfig.from_hf(hf_config(kind, tower=tower, vision_feature_select_strategy=strategy))
