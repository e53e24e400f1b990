"""What is given in place of a plain model or checkpoint is told by name, with a way to one that has all its weights."""

from __future__ import annotations

import copy
import functools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForImageTextToText, LlavaConfig, LlavaForConditionalGeneration, VipLlavaConfig

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.errors import CheckpointError, ConfigError, InputError
from hooked_llava.loading.checkpoint import read_config
from hooked_llava.loading.supported import as_dtype, check_model
from hooked_llava.loading.weights import read_headers, stream_tensors
from hooked_llava.model.llava import HookedLLaVA
from tests.builders import make_hf_model, make_prompt, tiny_hf_config
from tests.fixtures_processor import make_processor, make_tokenizer
from tests.loading.checkpoints import state_in, write_state
from tests.pairs import as_users_run

pytestmark = [  # of PEFT on transformers 5, and of torch.compile
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The PEFT config's `base_model_name_or_path`:UserWarning"),
    pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]
LORA = LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)


@functools.cache
def plain() -> LlavaForConditionalGeneration:
    return make_hf_model()


def fresh() -> LlavaForConditionalGeneration:
    return copy.deepcopy(plain())


# --- models in memory


def injected() -> nn.Module:
    hf_model = fresh()
    hf_model.add_adapter(LORA)
    return hf_model


def with_dtype(dtype: torch.dtype, *layers: str) -> nn.Module:
    hf_model = fresh()
    for layer in layers:
        module = hf_model.get_submodule(layer)
        module.weight = nn.Parameter(module.weight.to(dtype), requires_grad=False)
    return hf_model


def declared_quantized() -> nn.Module:
    """As transformers leaves a model whose quantizer keeps floating-point tensors with scales beside them."""
    hf_model = fresh()
    hf_model.is_quantized = True
    return hf_model


def packed() -> nn.Module:
    """As GPTQ's and AWQ's layers are."""
    hf_model = fresh()
    layer = nn.Module()
    layer.register_buffer("qweight", torch.zeros(6, 48, dtype=torch.int32))
    hf_model.model.language_model.layers[1].mlp.up_proj = layer
    return hf_model


def on_meta() -> nn.Module:
    with torch.device("meta"):
        return LlavaForConditionalGeneration(plain().config)


def offloaded() -> nn.Module:
    from accelerate import cpu_offload

    return cpu_offload(fresh(), execution_device=torch.device("cpu"))


def brought_in() -> nn.Module:
    """As between two passes of a model whose weights a hook replaces while it runs."""
    hf_model = fresh()
    hf_model.model.language_model._hf_hook = SimpleNamespace(offload=True)
    return hf_model


class Wrapper(nn.Module):
    def __init__(self, name: str, model: nn.Module) -> None:
        super().__init__()
        self.add_module(name, model)


def merged_in_place() -> nn.Module:
    wrapped = get_peft_model(fresh(), LORA)
    wrapped.merge_adapter()
    return wrapped


def prompt_tuned() -> nn.Module:
    hf_model = fresh()
    config = PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", token_dim=48, num_layers=3)
    config.num_attention_heads, config.num_transformer_submodules = 4, 1
    return get_peft_model(hf_model, config)


UP = "model.language_model.layers.1.mlp.up_proj"
MERGE = r"merge_and_unload\(\)"
UNQUANTIZED = r'quantized from.*dtype="bfloat16"'
OBJECTS: dict[str, tuple[Callable[[], Any], str]] = {
    "ours": (lambda: HookedLLaVA.from_hf(plain()), r"a HookedLLaVA.*already.*Use it as it is"),
    "name": (lambda: "llava-hf/llava-1.5-7b-hf", r"'llava-hf/llava-1.5-7b-hf'.*from_pretrained"),
    "path": (lambda: Path("some/folder"), r"'some/folder'.*from_pretrained"),
    "processor": (make_processor, r"LlavaProcessor.*from_hf\(hf_model, processor\)"),
    "tokenizer": (make_tokenizer, r"from_hf\(hf_model, processor\)"),
    "config": (tiny_hf_config, r"a LlavaConfig.*no weights"),
    "state dict": (lambda: plain().state_dict(), r"OrderedDict.*Pass the model itself"),
    "pipeline": (lambda: SimpleNamespace(model=plain(), task="image-text-to-text"), r"pipeline.*\.model"),
    "nothing": (lambda: None, r"a NoneType; expected.*LlavaForConditionalGeneration.*LlavaNextFor.*LlavaOnevisionFor"),
    "another module": (lambda: nn.Linear(2, 2), r"a Linear; expected.*LlavaForConditionalGeneration"),
    "compiled": (lambda: torch.compile(plain()), r"OptimizedModule.*hf_model\._orig_mod"),
    "data parallel": (lambda: nn.DataParallel(plain()), r"a DataParallel.*hf_model\.module"),
    "another wrapper": (lambda: Wrapper("module", plain()), r"a Wrapper.*hf_model\.module"),
    "adapter": (lambda: get_peft_model(fresh(), LORA), rf"a PeftModel.*not merged.*hf_model\.{MERGE}"),
    "other adapter": (
        lambda: get_peft_model(fresh(), IA3Config(target_modules=["k_proj"], feedforward_modules=[])),
        rf"a PeftModel.*not merged.*hf_model\.{MERGE}",
    ),
    "merged, still wrapped": (merged_in_place, rf"a PeftModel.*hf_model\.{MERGE}"),
    "adapter inside": (injected, rf"adapter.*q_proj\).*PeftModel\.from_pretrained\(base, adapter_name\)\.{MERGE}"),
    "tuned prompt": (prompt_tuned, r"tuned prompt.*cannot be merged.*get_base_model\(\)"),
    "no head": (lambda: plain().model, r"a LlavaModel.*Pass the model around it.*ForConditionalGeneration"),
    "meta": (on_meta, r"not in memory \(model\..* is on the meta device\).*without device_map"),
    "offloaded": (offloaded, r"not in memory \(model\..* is on the meta device\).*without device_map"),
    "brought in": (brought_in, r"model\.language_model as they are used.*remove_hook_from_submodules"),
    "int8": (lambda: with_dtype(torch.int8, UP), rf"quantized.*{UP}\.weight is int8.*{UNQUANTIZED}"),
    "uint8": (lambda: with_dtype(torch.uint8, UP), rf"quantized.*{UP}\.weight is uint8.*{UNQUANTIZED}"),
    "fp8": (lambda: with_dtype(torch.float8_e4m3fn, UP, "lm_head"), rf"{UP}\.weight is float8_e4m3fn.*{UNQUANTIZED}"),
    "declared": (declared_quantized, rf"quantized.*is_quantized is True.*{UNQUANTIZED}"),
    "packed": (packed, rf"quantized.*{UP} is a .*Module.*{UNQUANTIZED}"),
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_what_is_no_plain_model_is_told_by_name(kind: str) -> None:
    make, message = OBJECTS[kind]
    given = make()
    with pytest.raises(ConfigError, match=message):
        HookedLLaVA.from_hf(given)


@pytest.mark.parametrize(
    ("name", "unwrap"),
    [
        ("compiled", lambda given: given._orig_mod),
        ("data parallel", lambda given: given.module),
        ("adapter", lambda given: given.merge_and_unload()),
        ("other adapter", lambda given: given.merge_and_unload()),
        ("merged, still wrapped", lambda given: given.merge_and_unload()),
        ("pipeline", lambda given: given.model),
    ],
)
def test_the_advice_ends_in_the_same_model(name: str, unwrap: Callable[[Any], Any]) -> None:
    given = OBJECTS[name][0]()
    runs = plain() if name in ("pipeline", "compiled") else given
    prompt = make_prompt(plain())
    with torch.no_grad():
        expected = runs(**prompt).logits
        found = HookedLLaVA.from_hf(unwrap(given))(prompt)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_an_adapter_is_merged_by_the_advice_for_files(tmp_path: Path) -> None:
    """The advice of `from_pretrained` on the adapter's folder, step by step."""
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    plain().save_pretrained(base)
    wrapped = get_peft_model(fresh(), LORA)
    wrapped.save_pretrained(adapter)
    with pytest.raises(CheckpointError, match=rf"adapter.*adapter_config\.json.*{MERGE}"):
        HookedLLaVA.from_pretrained(adapter)
    loaded = AutoModelForImageTextToText.from_pretrained(base)
    ours = HookedLLaVA.from_hf(PeftModel.from_pretrained(loaded, adapter).merge_and_unload())
    prompt = make_prompt(plain())
    with torch.no_grad():
        expected, without = wrapped(**prompt).logits, plain()(**prompt).logits
    torch.testing.assert_close(ours(prompt), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, without, rtol=1e-2)


def test_a_plain_model_is_accepted_in_every_dtype_and_after_a_merge() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        check_model(fresh().to(dtype))
    check_model(get_peft_model(fresh(), LORA).unload())
    check_model(plain())


def test_another_architecture_is_told_by_its_config() -> None:
    other = nn.Module()
    other.config = VipLlavaConfig()
    with pytest.raises(ConfigError, match="'vipllava'.*Known: llava"):
        HookedLLaVA.from_hf(other)


# --- processors


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_processor(patch_size=4), r"patch_size=4.*8.*processor\.patch_size = 8"),
        (lambda: make_processor(image_size=32), r"32 x 32.*16 x 16"),
        (lambda: make_processor(select_strategy="full"), r"writes 5 <image> tokens.*'full'.*takes 4.*= 'default'"),
        (make_tokenizer, r"no tokenizer; expected a LlavaProcessor"),
    ],
)
def test_a_processor_of_another_model_is_found_at_the_door(make: Callable[[], Any], message: str) -> None:
    with as_users_run(), pytest.raises(InputError, match=message):
        HookedLLaVA.from_hf(plain(), make())


def test_a_processor_that_a_checkpoint_brings_along_is_blamed_itself(tmp_path: Path) -> None:
    """The folder loads, for token ids; a question does not blame the prompt."""
    model = HookedLLaVA.from_hf(plain(), make_processor())
    model.processor.num_additional_image_tokens = 0
    model.save_pretrained(tmp_path / "folder")
    again = HookedLLaVA.from_pretrained(tmp_path / "folder")
    with pytest.raises(InputError, match=r"LlavaProcessor writes 3 <image> tokens.*num_additional_image_tokens = 1"):
        again.prepare("What color is the star?")
    again.processor.num_additional_image_tokens = 1
    assert again.prepare("What color is the star?").shape[0] == 1


# --- checkpoint folders


ORIGINAL = {  # liuhaotian/llava-v1.5-7b, the fields that count
    "architectures": ["LlavaLlamaForCausalLM"],
    "hidden_size": 4096,
    "mm_hidden_size": 1024,
    "mm_projector_type": "mlp2x_gelu",
    "mm_use_im_patch_token": False,
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "model_type": "llava",
    "torch_dtype": "float16",
    "vocab_size": 32000,
}
LAYOUT = r"original LLaVA code.*llava-hf/llava-1\.5-7b-hf.*at random"


def config_file(folder: Path, fields: dict[str, Any]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.safetensors", None])
@pytest.mark.parametrize(
    "fields",
    [
        ORIGINAL,
        ORIGINAL | {"model_type": "llava_llama"},
        {"model_type": "llava", "mm_vision_tower": "openai/clip-vit-large-patch14-336"},
        {"model_type": "llava_mistral"},
        {"model_type": "llava", "architectures": ["LlavaMistralForCausalLM"]},
    ],
)
def test_the_original_layout_is_told(tmp_path: Path, fields: dict[str, Any], weights: str | None) -> None:
    config_file(tmp_path, fields)
    if weights:
        (tmp_path / weights).write_bytes(b"not read")
    with pytest.raises(CheckpointError, match=LAYOUT) as error:
        HookedLLaVA.from_pretrained(tmp_path)
    assert "save_pretrained(new_folder)" not in str(error.value)


def test_the_original_layout_is_told_by_its_tensors(tmp_path: Path) -> None:
    state = state_in("as on the hub", plain())
    state = {re.sub(r"^multi_modal_projector\.linear_", "model.mm_projector.", name): t for name, t in state.items()}
    write_state(tmp_path, plain().config, state)
    with pytest.raises(CheckpointError, match=LAYOUT):
        HookedLLaVA.from_pretrained(tmp_path)


def test_the_original_layout_is_told_by_an_index_of_pickles(tmp_path: Path) -> None:
    plain().config.save_pretrained(tmp_path)
    index = {"weight_map": {"model.mm_projector.0.weight": "pytorch_model-00001-of-00002.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=LAYOUT):
        HookedLLaVA.from_pretrained(tmp_path)


def test_advice_on_pickles_asks_whether_anything_was_missing(tmp_path: Path) -> None:
    plain().config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"output_loading_info=True.*missing_keys.*is empty"):
        HookedLLaVA.from_pretrained(tmp_path)


@pytest.mark.parametrize("with_config", [False, True])
def test_an_adapter_folder_is_told_with_its_base(tmp_path: Path, with_config: bool) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "llava-hf/llava-1.5-7b-hf"}')
    save_file({"base_model.model.lm_head.lora_A.weight": torch.ones(2)}, tmp_path / "adapter_model.safetensors")
    if with_config:
        plain().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=rf"adapter.*llava-hf/llava-1\.5-7b-hf.*{MERGE}"):
        HookedLLaVA.from_pretrained(tmp_path)


def test_an_adapter_is_told_by_its_tensors(tmp_path: Path) -> None:
    state = state_in("as on the hub", plain())
    name = "language_model.model.layers.1.self_attn.q_proj"
    state[f"{name}.base_layer.weight"] = state.pop(f"{name}.weight")
    state[f"{name}.lora_A.default.weight"] = torch.ones(2, 48)
    write_state(tmp_path, plain().config, state)
    with pytest.raises(CheckpointError, match=rf"adapter.*q_proj.*{MERGE}"):
        HookedLLaVA.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("part", "method"),
    [(None, "gptq"), (None, "fp8"), ("text_config", "bitsandbytes"), ("text_config", "gptq"), ("vision_config", "fp8")],
)
def test_quantized_checkpoints_are_told_by_their_config(tmp_path: Path, part: str | None, method: str) -> None:
    fields = tiny_hf_config().to_dict()
    (fields[part] if part else fields)["quantization_config"] = {"quant_method": method}
    config_file(tmp_path, fields)
    with pytest.raises(CheckpointError, match=rf"quantized.*quantization_config of '{method}'.*{UNQUANTIZED}"):
        HookedLLaVA.from_pretrained(tmp_path)


@pytest.mark.parametrize("suffix", ["SCB", "qweight", "weight_scale", "weight_scale_inv", "weight.absmax"])
def test_quantized_checkpoints_are_told_by_their_tensors(tmp_path: Path, suffix: str) -> None:
    state = state_in("as on the hub", plain())
    state[f"language_model.model.layers.1.mlp.up_proj.{suffix}"] = torch.ones(2)
    write_state(tmp_path, plain().config, state)
    with pytest.raises(CheckpointError, match=rf"quantized.*up_proj\.{suffix}.*{UNQUANTIZED}"):
        HookedLLaVA.from_pretrained(tmp_path)


def test_a_llama_cpp_folder_is_told(tmp_path: Path) -> None:
    plain().config.save_pretrained(tmp_path)
    (tmp_path / "llava-q4.gguf").touch()
    with pytest.raises(CheckpointError, match=r"llama\.cpp \(llava-q4\.gguf\)"):
        HookedLLaVA.from_pretrained(tmp_path)


# --- dtypes


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_dtypes_by_name(tmp_path: Path, dtype: str) -> None:
    plain().save_pretrained(tmp_path)
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype=dtype)
    for given in (dtype, f"torch.{dtype}", getattr(torch, dtype)):
        ours = HookedLLaVA.from_pretrained(tmp_path, dtype=given)
        assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("said", ["bfloat16", "float32", None])
def test_auto_is_what_transformers_takes(tmp_path: Path, stored: torch.dtype, said: str | None) -> None:
    """The config's dtype, or where it names none, that of the stored weights."""
    write_state(tmp_path, plain().config, {n: t.to(stored) for n, t in state_in("as on the hub", plain()).items()})
    fields = json.loads((tmp_path / "config.json").read_text())
    for part in (fields, fields["text_config"], fields["vision_config"]):
        part.pop("dtype", None)
    config_file(tmp_path, fields | ({"dtype": said} if said else {}))
    theirs = LlavaForConditionalGeneration.from_pretrained(tmp_path, dtype="auto")
    for options in ({}, {"dtype": "auto"}, {"dtype": None}):
        ours = HookedLLaVA.from_pretrained(tmp_path, **options)
        assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()}


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool, torch.complex64, "int8", "long"])
def test_a_dtype_that_is_no_floating_point_is_refused(dtype: torch.dtype | str) -> None:
    with pytest.raises(ConfigError, match=rf"dtype='?{dtype}'? is not.*bfloat16.*\"auto\""):
        HookedLLaVA.from_pretrained("tiny-shapes", dtype=dtype)


@pytest.mark.parametrize("dtype", ["bf16", "float7", "", "nn", torch.float8_e4m3fn, "float8_e5m2"])
def test_an_unknown_dtype_is_refused(dtype: torch.dtype | str) -> None:
    with pytest.raises(ConfigError, match=r"dtype=.* is not.*float16, bfloat16, float32, float64"):
        as_dtype(dtype)


# --- the hub


def test_from_pretrained_hands_the_hubs_options_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def snapshot_download(name: str, **options: Any) -> str:
        asked.update(name=name, **options)
        return str(tmp_path / "snapshot")

    plain().save_pretrained(tmp_path / "snapshot")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    options = {"revision": "v1.5", "token": "hf_secret", "cache_dir": tmp_path / "cache"}
    model = HookedLLaVA.from_pretrained("owner/name", **options)
    assert {key: asked[key] for key in ("name", *options)} == {"name": "owner/name", **options}
    assert model.config.model_name == "owner/name"
    HookedLLaVA.from_pretrained("owner/name")
    assert {asked[key] for key in options} == {None}
    asked.clear()
    HookedLLaVA.from_pretrained(tmp_path / "snapshot", **options)  # a folder: the hub is not asked
    assert not asked


def test_what_is_read_before_was_not_made_stricter(tmp_path: Path) -> None:
    """A checkpoint of ours loads, and its config says nothing else than before."""
    plain().save_pretrained(tmp_path)
    config = LLaVAConfig.from_hf(read_config(tmp_path))
    assert dict(stream_tensors(read_headers(tmp_path), config)).keys()
    assert isinstance(read_config(tmp_path), LlavaConfig)
