from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoProcessor, GenerationConfig, LlavaForConditionalGeneration

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.tensors import our_name
from hooked_llava.errors import CheckpointError
from hooked_llava.loading import saving
from hooked_llava.loading.checkpoint import read_config, read_generation_config, stored_dtype
from hooked_llava.loading.saving import save
from hooked_llava.loading.weights import read_headers, stream_tensors
from tests.builders import make_hf_model, make_prompt


def our_state(hf_model) -> dict[str, torch.Tensor]:
    config = LLaVAConfig.from_hf(hf_model.config)
    named = {our_name(name, config): parameter for name, parameter in hf_model.named_parameters(remove_duplicate=False)}
    return {name: parameter for name, parameter in named.items() if name}


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def hf_model():
    return make_hf_model()


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB", 30_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bit_identical(tmp_path, max_shard_size, dtype, tied):
    hf_model = make_hf_model(dtype=dtype, tied=tied)
    folder = save(our_state(hf_model), hf_model.config, None, tmp_path / "new", max_shard_size=max_shard_size)
    config = LLaVAConfig.from_hf(read_config(folder))
    assert config == LLaVAConfig.from_hf(hf_model.config)
    read = dict(stream_tensors(read_headers(folder), config))
    state = our_state(hf_model)
    assert set(state) - set(read) == ({"language.unembed.weight"} if tied else set())
    assert all(torch.equal(tensor, state[name]) and tensor.dtype == dtype for name, tensor in read.items())


@pytest.mark.parametrize("max_shard_size", ["5GB", "100KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_plain_transformers_loads_what_is_saved(tmp_path, max_shard_size, tied):
    hf_model = make_hf_model(tied=tied)
    folder = save(our_state(hf_model), hf_model.config, None, tmp_path / "new", max_shard_size=max_shard_size)
    again, report = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())
    prompt = make_prompt(hf_model)
    with torch.no_grad():
        assert torch.equal(again(**prompt).logits, hf_model(**prompt).logits)


def test_names_on_disk_are_those_that_transformers_writes(tmp_path, hf_model):
    hf_model.save_pretrained(tmp_path / "theirs")
    save(our_state(hf_model), hf_model.config, None, tmp_path / "ours")
    ours, theirs = (safe_open(tmp_path / who / "model.safetensors", "pt") for who in ("ours", "theirs"))
    assert set(ours.keys()) == set(theirs.keys())
    assert ours.metadata() == theirs.metadata() == {"format": "pt"}
    assert (tmp_path / "ours/config.json").read_text() == (tmp_path / "theirs/config.json").read_text()


def test_shards_stay_below_the_size_and_the_index_names_them(tmp_path, hf_model):
    folder = save(our_state(hf_model), hf_model.config, None, tmp_path / "new", max_shard_size="0.1MB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(parameter.nbytes for parameter in hf_model.parameters())
    shards = sorted(set(index["weight_map"].values()))
    assert shards == sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2
    assert all((folder / shard).stat().st_size < 110_000 for shard in shards)


def test_the_config_says_the_dtype_of_the_weights(tmp_path, hf_model):
    state = {name: tensor.half() for name, tensor in our_state(hf_model).items()}
    folder = save(state, hf_model.config, None, tmp_path / "new")
    assert read_config(folder).dtype == torch.float16
    assert stored_dtype(hf_model.config) == torch.float32  # the caller's config is left as it was


def test_weights_that_are_views_are_saved(tmp_path, hf_model):
    state = our_state(hf_model)
    name = "language.blocks.0.mlp.up.weight"
    state[name] = state[name].T.contiguous().T
    folder = save(state, hf_model.config, None, tmp_path / "new")
    assert torch.equal(
        dict(stream_tensors(read_headers(folder), LLaVAConfig.from_hf(hf_model.config)))[name], state[name]
    )


def test_processor_and_generation_config_are_saved(tmp_path, hf_model):
    from hooked_llava.toy.processor import build_processor

    processor = build_processor()
    generation_config = GenerationConfig(eos_token_id=[2, 7], max_length=33)
    folder = save(
        our_state(hf_model), hf_model.config, processor, tmp_path / "new", generation_config=generation_config
    )
    again = AutoProcessor.from_pretrained(folder)
    assert again.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert again.chat_template == processor.chat_template
    assert read_generation_config(folder).eos_token_id == [2, 7]


VICUNA = {"temperature": 0.9, "top_p": 0.6, "bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize("fields", [VICUNA, {"top_k": 7}, {"num_beams": 1, "early_stopping": True}])
@pytest.mark.parametrize("changed", [False, True])
def test_generation_config_with_unused_parameters_is_saved_as_it_is(tmp_path, hf_model, fields, changed):
    """What the published file says, whether it is as it was read or was changed since."""
    generation_config = GenerationConfig(**fields)
    if changed:
        generation_config.max_new_tokens = 11
    folder = save(our_state(hf_model), hf_model.config, None, tmp_path / "new", generation_config=generation_config)
    written = json.loads((folder / "generation_config.json").read_text())
    del written["transformers_version"]
    assert written == fields | ({"max_new_tokens": 11} if changed else {})
    plain = LlavaForConditionalGeneration.from_pretrained(folder)
    assert plain.generation_config.to_diff_dict().items() >= written.items()
    assert not plain.generation_config.do_sample


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path, hf_model):
    folder = save(our_state(hf_model), hf_model.config, None, tmp_path / "new", max_shard_size="100KB")
    (folder / "stale.txt").write_text("from before")
    before = contents(folder)
    with pytest.raises(CheckpointError, match=r"new exists already\. Give another name, or overwrite=True"):
        save(our_state(hf_model), hf_model.config, None, folder)
    assert contents(folder) == before
    save(our_state(make_hf_model(seed=1)), hf_model.config, None, folder, overwrite=True)
    assert not (folder / "stale.txt").exists()
    assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_an_empty_folder_may_be_filled(tmp_path, hf_model):
    (tmp_path / "new").mkdir()
    assert (save(our_state(hf_model), hf_model.config, None, tmp_path / "new") / "config.json").is_file()


def test_a_folder_that_is_no_checkpoint_is_never_replaced(tmp_path, hf_model):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("precious")
    with pytest.raises(CheckpointError, match=r"thesis.*no checkpoint.*config\.json"):
        save(our_state(hf_model), hf_model.config, None, tmp_path / "thesis", overwrite=True)
    assert (tmp_path / "thesis/chapter.tex").read_text() == "precious"
    with pytest.raises(CheckpointError, match="a file; expected.*folder"):
        save(our_state(hf_model), hf_model.config, None, tmp_path / "thesis/chapter.tex", overwrite=True)


@pytest.mark.parametrize("older", [False, True])
def test_a_failure_leaves_nothing_behind(tmp_path, hf_model, monkeypatch, older):
    if older:
        save(our_state(hf_model), hf_model.config, None, tmp_path / "new")
    before = contents(tmp_path)
    written = []

    def failing(tensors, path, metadata):
        written.append(path)
        path.write_bytes(b"half")
        if len(written) == 2:
            raise OSError("No space left on device")

    monkeypatch.setattr(saving, "save_file", failing)
    with pytest.raises(OSError, match="No space left"):
        save(our_state(hf_model), hf_model.config, None, tmp_path / "new", max_shard_size="100KB", overwrite=True)
    assert len(written) == 2
    assert contents(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == (["new"] if older else [])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("vision.class_embed"), "vision.class_embed is missing, expected (32,)"),
        (lambda state: state.update(extra=torch.ones(2)), "extra is (2,), expected absent"),
        (
            lambda state: state.update({"vision.class_embed": torch.ones(3)}),
            "vision.class_embed is (3,), expected (32,)",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused(tmp_path, hf_model, change, message):
    state = our_state(hf_model)
    change(state)
    with pytest.raises(CheckpointError) as error:
        save(state, hf_model.config, None, tmp_path / "new")
    assert message in str(error.value)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["big", "5", "GB", "1.2.3MB", "-1GB"])
def test_a_shard_size_that_is_none_is_refused(tmp_path, hf_model, size):
    with pytest.raises(CheckpointError, match=f"max_shard_size='{size}'.*'5GB'"):
        save(our_state(hf_model), hf_model.config, None, tmp_path / "new", max_shard_size=size)
