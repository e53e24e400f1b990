"""Training: packed rows equal single prompts, a resumed run equals an uninterrupted one, the checkpoint is complete."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from hooked_llava.toy.alignment import align, image_embeddings, patch_contents, vision_states
from hooked_llava.toy.evaluate import EVALUATED, evaluate, held_out, markdown_table, predict
from hooked_llava.toy.init import build_model
from hooked_llava.toy.objects import SHAPES
from hooked_llava.toy.packing import BatchShape, KindSampler, encode, pixels_of, sample_batch
from hooked_llava.toy.processor import build_processor, vocabulary
from hooked_llava.toy.questions import ANSWER_KINDS, ask, format_answer, format_prompt
from hooked_llava.toy.scenes import normalize, sample_scene
from hooked_llava.toy.train import CHECKPOINT_FOLDER, LOG_FILE, TrainConfig, Trainer, packed_logits, train
from hooked_llava.toy.worlds import WORLDS

SQUARE = WORLDS["tiny-shapes"]
TINY = TrainConfig(
    seed=3,
    steps=3,
    align_steps=2,
    decay_steps=1,
    warmup=2,
    align_images=3,
    image_rows=1,
    text_rows=1,
    row_length=112,
)


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return build_model(0).eval()


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return build_processor()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    out = tmp_path_factory.mktemp("run")
    return train(TINY, out, log_every=1), out


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach() for n, p in trainer.model.named_parameters()}


@pytest.mark.parametrize("name", WORLDS)
def test_a_packed_segment_equals_its_single_prompt(name: str) -> None:
    world, n_images = WORLDS[name], 3
    model, processor = world.build_model(0).eval(), world.build_processor()
    shape = BatchShape(n_images, 2, 224 if name == "tiny-shapes" else 400)
    batch = sample_batch(np.random.default_rng(5), world, KindSampler(world.kinds), shape, world.max_objects)
    with torch.no_grad():
        packed, _, _ = packed_logits(world, model, batch)
    seen = set()
    for i, target in enumerate(batch.targets):
        if target.kind in seen | {"", *world.learnt}:
            continue
        seen.add(target.kind)
        segments = batch.segments[target.row]
        before = torch.arange(len(segments)) <= target.position
        ids = batch.ids[target.row][((segments == segments[target.position]) | (segments == 0)) & before]
        prompt = re.sub("(<image> )+", "<image>\n", processor.tokenizer.decode(ids[1:]))
        images = [batch.scenes[target.row].render()] if target.row < n_images else None
        inputs = processor(images=images, text=prompt, return_tensors="pt")
        assert inputs["input_ids"][0].tolist() == ids.tolist()
        with torch.no_grad():
            single = model(**inputs).logits[0, -1]
        torch.testing.assert_close(packed[i], single, atol=1e-4, rtol=0)
    assert len(seen) >= 8


def test_a_resumed_run_equals_an_uninterrupted_one(finished: tuple[Trainer, Path], tmp_path: Path) -> None:
    for stop_at in (1, 3, None):  # stops inside the first stage, inside the second, and at the end
        resumed = train(TINY, tmp_path, log_every=1, stop_at=stop_at)
    expected = weights(finished[0])
    assert all(torch.equal(w, expected[n]) for n, w in weights(resumed).items())
    assert resumed.sampler.errors == finished[0].sampler.errors


def test_the_number_of_steps_may_change_only_before_the_decline(finished: tuple[Trainer, Path], tmp_path: Path) -> None:
    train(replace(TINY, steps=9, decay_steps=5), tmp_path, log_every=1, stop_at=4)
    resumed = train(TINY, tmp_path, log_every=1)
    expected = weights(finished[0])
    assert all(torch.equal(w, expected[n]) for n, w in weights(resumed).items())
    with pytest.raises(ValueError, match=r"run with \{.*not \{.*'(steps': 9|seed': 4)"):
        train(replace(TINY, steps=9), tmp_path)
    with pytest.raises(ValueError, match=r"run with \{.*not \{.*'(steps': 9|seed': 4)"):
        train(replace(TINY, seed=4), tmp_path)


def test_the_schedule_leaves_kinds_out() -> None:
    trainer = Trainer(replace(TINY, schedule="list_places=0-2 list_patterns=1-"))
    absent = []
    for trainer.step in range(4):
        absent.append(trainer._not_now())
    assert absent == [("list_patterns",), (), ("list_places",), ("list_places",)]
    batch = sample_batch(
        np.random.default_rng(0),
        SQUARE,
        KindSampler(SQUARE.kinds),
        BatchShape(2, 1, 224),
        5,
        ("list_places", "caption"),
    )
    assert not {"list_places", "caption"} & {t.kind for t in batch.targets}


def test_training_goes_on_from_a_checkpoint_with_more_words(finished: tuple[Trainer, Path], tmp_path: Path) -> None:
    """`tiny-shapes-next` knows the words of `tiny-shapes` and more; here a model without the last ones is the start."""
    world = WORLDS["tiny-shapes-next"]
    model, words = world.build_model(0), len(world.vocabulary)
    model.resize_token_embeddings(words - 3)
    model.save_pretrained(tmp_path)
    config = replace(TINY, world=world.name, start=str(tmp_path), align_steps=0, neighbor_weight=1.0)
    config = replace(config, image_rows=3, row_length=400)
    first, second = Trainer(config), Trainer(config)
    assert all(torch.equal(w, weights(second)[n]) for n, w in weights(first).items())
    old, new = (m.get_input_embeddings().weight for m in (model, first.model))
    assert len(new) == words == first.model.config.get_text_config().vocab_size
    assert torch.equal(old, new[:-3])
    before = {n: p.clone() for n, p in first.neighbor_heads.named_parameters()}
    assert first.train_step()["neighbor_loss"] > 0
    assert all(not torch.equal(p, before[n]) for n, p in first.neighbor_heads.named_parameters())


def test_every_weight_that_matters_moves(finished: tuple[Trainer, Path]) -> None:
    start = dict(build_model(TINY.seed).named_parameters())
    still = {n for n, w in weights(finished[0]).items() if torch.equal(w, start[n])}
    assert all("encoder.layers.4." in n or "post_layernorm" in n for n in still), still


def test_the_log_has_a_line_per_interval(finished: tuple[Trainer, Path]) -> None:
    lines = [json.loads(line) for line in (finished[1] / LOG_FILE).read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert [line["stage"] for line in lines] == ["align"] * 2 + ["answer"] * 3
    assert {"lr", "seconds", "loss", "align_loss", "patch_shape", "patch_color"} <= set(lines[-1])
    assert set(lines[-1]["accuracy"]) == set(lines[-1]["asked"])


def test_the_checkpoint_is_complete(finished: tuple[Trainer, Path]) -> None:
    trainer, folder = finished[0], finished[1] / CHECKPOINT_FOLDER
    loaded = LlavaForConditionalGeneration.from_pretrained(folder)
    assert loaded.dtype == torch.float32
    for name, weight in loaded.named_parameters():
        assert torch.equal(weight, weights(trainer)[name].half().float())
    vocab = vocabulary()
    for config in (loaded.config, loaded.generation_config):
        ids = (config.pad_token_id, config.bos_token_id, config.eos_token_id)
        assert ids == (vocab["<pad>"], vocab["<s>"], vocab["</s>"])
    assert sum(f.stat().st_size for f in folder.iterdir()) < 5e6
    processor = AutoProcessor.from_pretrained(folder)
    examples = held_out("color_vqa", 5) + held_out("exist", 5)
    assert predict(loaded.eval(), processor, examples) == predict(loaded, processor, examples, batch_size=1)


def test_the_processor_survives_a_round_trip(processor: LlavaProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert isinstance(loaded, LlavaProcessor)
    scene = sample_scene(np.random.default_rng(0))
    prompt = "USER: <image>\nWhat color is the star? Answer briefly. ASSISTANT:"
    before = processor(images=scene.render(), text=prompt, return_tensors="pt")
    after = loaded(images=scene.render(), text=prompt, return_tensors="pt")
    assert set(before) == set(after)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert (before["input_ids"] == vocabulary()["<image>"]).sum() == 64
    assert loaded.tokenizer.padding_side == "left"
    message = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What color is the star?"}]}]
    assert loaded.apply_chat_template(message, add_generation_prompt=True) == prompt


def test_the_training_loop_reads_words_and_pixels_as_the_processor_does(processor: LlavaProcessor) -> None:
    rng = np.random.default_rng(0)
    tokenizer = processor.tokenizer
    for kind in ANSWER_KINDS:
        scene = sample_scene(rng, 1 if kind in ("fact_image", "name_shape") else 5)
        question = ask(kind, scene, rng)
        assert question is not None
        text = f"{format_prompt(question)} {format_answer(question)}"
        ids = tokenizer(text)["input_ids"]
        assert ids == [tokenizer.bos_token_id, *encode(SQUARE, text)]
        assert tokenizer.unk_token_id not in ids
    pixels = processor(images=scene.render(), text="<image>", return_tensors="pt")["pixel_values"][0]
    np.testing.assert_allclose(pixels.numpy(), normalize(scene.pixels), atol=1e-5)


def test_token_offsets_and_decoding(processor: LlavaProcessor) -> None:
    text = "USER: What is the color of the star? ASSISTANT: The color of the star is red."
    encoded = processor.tokenizer(text, return_offsets_mapping=True)
    words = [text[a:b] for a, b in encoded["offset_mapping"][1:]]
    assert words == processor.tokenizer.convert_ids_to_tokens(encoded["input_ids"][1:])
    assert processor.tokenizer.decode(encoded["input_ids"], skip_special_tokens=True) == text


def test_alike_tokens_attend_to_each_other_from_the_start(model: LlavaForConditionalGeneration) -> None:
    vocab, tower = vocabulary(), model.model.language_model
    embed = tower.embed_tokens.weight.detach()
    star, heart, red = (embed[vocab[w]] for w in ("star", "heart", "red"))
    unit = torch.stack([star, star + red, heart + red])
    unit = unit / unit.square().mean(-1, keepdim=True).sqrt()
    for layer in tower.layers[2:]:  # two heads of the first two layers look at positions instead
        q = layer.self_attn.q_proj(unit[0]).unflatten(0, (8, 16))
        k = layer.self_attn.k_proj(unit).unflatten(-1, (8, 16))
        itself, patch, other = ((q * k).sum(-1) / 4).mean(-1).tolist()
        assert 3 < itself < 8
        assert 1.5 < patch < 5
        assert other < patch - 1


def test_the_last_heads_of_the_first_layers_look_back(processor: LlavaProcessor) -> None:
    model = build_model(0).eval()
    model.set_attn_implementation("eager")
    inputs = processor.tokenizer(
        "USER: The star is red. The circle is blue. What color is the circle?", return_tensors="pt"
    )
    with torch.no_grad():
        attentions = model(**inputs, output_attentions=True).attentions
    for head, back in ((6, 1), (7, 2)):
        pattern = attentions[0][0, head]
        assert pattern.diagonal(-back)[4:].mean() > 0.5


def test_patch_words_are_found_where_the_targets_put_them(model: LlavaForConditionalGeneration) -> None:
    scene = sample_scene(np.random.default_rng(2))
    shape, color, pattern = patch_contents([scene], [SQUARE.views(scene)])
    labels = torch.from_numpy(scene.patch_labels().reshape(-1))
    assert torch.equal(shape[0] >= 0, labels >= 0)
    assert [SHAPES[i] for i in shape[0][labels >= 0]] == [scene.objects[i].shape for i in labels[labels >= 0]]
    assert torch.equal(shape >= 0, color >= 0)
    assert torch.equal(shape >= 0, pattern >= 0)
    views = [SQUARE.views(scene)]
    images = image_embeddings(model, vision_states(model, pixels_of(views)))
    assert images.shape == (1, 64, 128)
    assert align(model, images, [scene], views).loss.item() > 0


def test_evaluation_gives_a_table(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> None:
    kinds = ("query_color", "fact_name", "fact_name, with an image")
    results = evaluate(model, processor, n=8, kinds=kinds)
    assert set(results) == set(kinds) <= set(EVALUATED["tiny-shapes"])
    table = markdown_table({"one": results, "two": results})
    assert table.count("\n") == len(kinds) + 1
    assert len({line.count("|") for line in table.splitlines()}) == 1
    with pytest.raises(ValueError, match="kind.*one of .*got '"):
        held_out("nonsense", 1)
