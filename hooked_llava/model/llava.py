"""HookedLLaVA: vision tower -> projector -> language tower, with a name for every activation.

Reimplements `LlavaForConditionalGeneration` of Hugging Face transformers (Liu et al. 2023, arXiv 2304.08485 and
2310.03744) in the manner of TransformerLens: the same logits from the same weights, and a hook point on everything.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.hooks import HookTable
from hooked_llava.architecture.supported import supported
from hooked_llava.architecture.tensors import expected_tensors, model_config
from hooked_llava.errors import CheckpointError, ConfigError, InputError
from hooked_llava.loading.checkpoint import load_processor, read_config, read_generation_config, stored_dtype
from hooked_llava.loading.embedded import resolve
from hooked_llava.loading.placement import DeviceMap, placed
from hooked_llava.loading.quantization import Quantization, QuantizationLike, as_quantization, quantization_of
from hooked_llava.loading.saving import save
from hooked_llava.loading.sharing import share_weights
from hooked_llava.loading.supported import as_dtype, check_model
from hooked_llava.loading.weights import load_into, read_headers
from hooked_llava.machine.devices import check_device, to_device
from hooked_llava.model import generation
from hooked_llava.model.components.assembly import assemble
from hooked_llava.model.components.attention import AttentionContext
from hooked_llava.model.components.hook_point import HookPoint
from hooked_llava.model.components.kv_cache import KVCache
from hooked_llava.model.components.quantized import quantize_linears, stored_state
from hooked_llava.model.description import Description
from hooked_llava.model.hooked_module import HookedModule
from hooked_llava.model.language import LanguageTower
from hooked_llava.model.projector import Projector
from hooked_llava.model.request import ForwardRequest, ReturnType
from hooked_llava.model.requirements import check_supported, missing_for
from hooked_llava.model.summary import summary
from hooked_llava.model.vision import VisionTower
from hooked_llava.prompt import prepare as inputs_module
from hooked_llava.prompt.images import ImagesLike
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.prepare import InputsLike
from hooked_llava.prompt.processor import Processor
from hooked_llava.prompt.validation import check_processor_fits

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from hooked_llava.model.verify import ParityTable


class HookedLLaVA(HookedModule):
    """A LLaVA model whose every activation can be read, cached and changed by name.

    >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
    >>> logits, cache = model.run_with_cache(model.prepare("Who made the star?"), names_filter="pattern")
    >>> cache["pattern", 3].shape[1] == model.cfg.n_heads
    True
    """

    def __init__(
        self,
        config: LLaVAConfig,
        vision: VisionTower,
        projector: Projector,
        language: LanguageTower,
        *,
        processor: Processor | None = None,
        hf_config: PreTrainedConfig | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.vision = vision
        self.projector = projector
        self.language = language
        self.processor = processor
        self.hf_config = hf_config
        self.generation_config = None
        self.no_processor = "none was given"
        tiled = config.tiling is not None
        self.image_newline = nn.Parameter(torch.empty_like(language.embed.weight[0])) if tiled else None
        self.hook_image_embed = HookPoint()
        self.hooks_table = HookTable(config)
        self.setup()
        self.requires_grad_(False)
        self.eval()

    def __repr__(self) -> str:
        """The parts and their sizes; `print(model.language)` and its like show every module of a part."""
        return summary(self, self.config)

    # ------------------------------------------------------------------ from pixels and tokens to logits

    def forward(
        self,
        inputs: InputsLike | ForwardRequest | None = None,
        *,
        return_type: ReturnType = "logits",
        start_at_layer: int = 0,
        stop_at_layer: int | None = None,
        input_ids: Int[Tensor, "batch pos"] | None = None,
        pixel_values: Float[Tensor, "*image tile channel height width"] | None = None,
        image_sizes: Int[Tensor, "image 2"] | None = None,
        batch_num_images: Int[Tensor, " prompt"] | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
    ) -> Tensor | None:
        """Logits [batch pos d_vocab], the loss, or nothing.

        `inputs` is anything `as_inputs` takes; or the residual stream [batch pos d_model] entering `start_at_layer`,
        with the prompt's mask if something is padded; or all arguments at once, as `request` has checked them. With
        `stop_at_layer` the residual stream entering that layer is returned instead. The loss is the mean cross-entropy
        in nats of the next token, over text tokens. Raises `InputError` for input that does not fit.
        """
        request = self.request(
            inputs,
            return_type=return_type,
            start_at_layer=start_at_layer,
            stop_at_layer=stop_at_layer,
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_sizes=image_sizes,
            batch_num_images=batch_num_images,
            attention_mask=attention_mask,
            position_ids=position_ids,
        )
        with self.placing(request.prompt):  # attached interventions find their positions in this prompt
            resid = (
                self.embed(request.begin) if isinstance(request.begin, Inputs) else request.begin.to(self.cfg.device)
            )  # (batch, pos, d_model)
            context = self.context(resid, request.attention_mask, request.position_ids)
            resid = self.language(resid, context, start_at_layer=request.start, stop_at_layer=request.stop)
            if request.stop is not None:
                return resid.to(self.cfg.device)
            logits = self.language.to_logits(resid)  # (batch, pos, d_vocab)
        if request.return_type == "loss":
            assert request.prompt is not None
            return self.loss(logits, request.prompt)
        return logits if request.return_type == "logits" else None

    def embed(self, inputs: InputsLike) -> Float[Tensor, "batch pos d_model"]:
        """What enters the language tower: token embeddings, with the image embeddings at the image positions."""
        inputs = inputs if isinstance(inputs, Inputs) else self.as_inputs(inputs)
        if inputs.pixel_values is None:
            self._refuse_image_hooks()
            return self.language.embed_tokens(inputs.input_ids)
        projected = self.project(self.vision(inputs.pixel_values), inputs)  # (image, feature, d_model)
        text = self.language.embed_tokens(inputs.input_ids)  # (batch, pos, d_model)
        images = self.real_features(self.hook_image_embed(projected), inputs)
        return text.masked_scatter(inputs.image_mask[..., None], images)

    def project(
        self, features: Float[Tensor, "run_tile patch d_features"], inputs: Inputs
    ) -> Float[Tensor, "run_image feature d_model"]:
        """Vision features as image embeddings: through the projector, and where images are cut into tiles, joined.

        The features are those of all tiles of the inputs, or of several runs over them, one run after the other (as
        Replay makes them). The embeddings are in the dtype and on the device of the token embeddings, whatever the projector's
        are. Images with fewer features than the longest are filled up with zeros, which `real_features` leaves out again.
        """
        projected = self.projector(features).to(self.language.embed.weight)  # (run_tile, patch, d_model)
        if self.image_newline is None:
            return projected
        return assemble(projected, self.image_newline, inputs.assembly)

    def real_features(
        self, images: Float[Tensor, "*run image feature d_model"], inputs: Inputs
    ) -> Float[Tensor, "*run real d_model"]:
        """The features of all images one after the other, without the zeros that fill up the shorter ones."""
        images = images.flatten(-3, -2)
        if self.image_newline is None or inputs.assembly.real is None:
            return images
        return images.index_select(-2, inputs.assembly.real)

    def context(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Bool[Tensor, "batch key"] | None = None,
        position_ids: Int[Tensor, "batch pos"] | None = None,
        kv_cache: KVCache | None = None,
    ) -> AttentionContext:
        """What attention needs for these positions; as `LanguageTower.context`, which says what the arguments are."""
        return self.language.context(
            resid.shape[1],
            attention_mask=attention_mask,
            position_ids=position_ids,
            kv_cache=kv_cache,
            device=resid.device,
            dtype=resid.dtype,
        )

    def loss(self, logits: Float[Tensor, "batch pos d_vocab"], inputs: Inputs) -> Float[Tensor, ""]:
        """Mean cross-entropy of the next token in nats; image tokens and padding are no targets."""
        targets = [
            (row, p)
            for row, m in enumerate(inputs.token_maps)
            for p in m.real[1:]
            if not any(p in image for image in m.image_ranges)
        ]
        if not targets:
            raise InputError("There is no text token with a token before it to predict it from, so there is no loss.")
        row, position = to_device(targets, inputs.device).unbind(-1)
        return F.cross_entropy(logits[row, position - 1].float(), inputs.input_ids[row, position])

    # ------------------------------------------------------------------ inputs

    def prepare(self, question: str | Sequence[str], images: ImagesLike | None = None, **options: Any) -> Inputs:
        """A question about images as the model takes it; see `hooked_llava.prompt.prepare.prepare` for the options.

        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> model.prepare("Who made the star?").shape[0]
        1
        """
        check_supported("prepare", self)
        return inputs_module.prepare(question, images, **self._inputs_for(), **options)

    def as_inputs(self, value: InputsLike) -> Inputs:
        """Inputs from inputs, text, token ids, or what a Hugging Face processor returns; raises `InputError`."""
        return inputs_module.as_inputs(value, **self._inputs_for())

    def _inputs_for(self) -> dict[str, Any]:
        """What `prepare` and `as_inputs` must know of this model, as keyword arguments.

        Pixels come in the vision tower's dtype, which may be finer than the language tower's.
        """
        pixel_dtype = self.vision.patch_embed.weight.dtype
        return {"config": self.config, "processor": self.processor, "device": self.cfg.device, "dtype": pixel_dtype}

    # ------------------------------------------------------------------ generation

    def generate(self, inputs: InputsLike, max_new_tokens: int = 20, **options: Any) -> Any:
        """The model's answer as text (a list of texts for a batch); see `hooked_llava.model.generation.generate`.

        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> isinstance(model.generate(model.prepare("Who made the star?"), max_new_tokens=2), str)
        True
        """
        return generation.generate(self, inputs, max_new_tokens, **options)

    def describe(self, inputs: InputsLike | None = None) -> Description:
        """What this model and these inputs support, and why not what they do not; without a forward pass.

        >>> model = HookedLLaVA.from_pretrained("tiny-shapes")
        >>> description = model.describe(model.prepare("Who made the star?"))
        >>> description.supports("patch_importance"), description.reason("patch_importance")[:12]
        (False, 'needs images')
        """
        return Description.of(self, None if inputs is None else self.as_inputs(inputs))

    def verify(self, hf_model: PreTrainedModel, inputs: InputsLike | None = None) -> ParityTable:
        """Every layer compared with a LLaVA model of transformers on the same input, as a table; see `verify.verify`."""
        from hooked_llava.model.verify import verify

        return verify(self, hf_model, inputs)

    # ------------------------------------------------------------------ loading and saving

    @staticmethod
    def supported() -> str:
        """What loads, by the `model_type` in a checkpoint's config, and how it is tested: a table in Markdown.

        >>> "| language model | `phi` |" in HookedLLaVA.supported()
        True
        """
        return supported()

    @classmethod
    def build(
        cls,
        config: LLaVAConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        processor: Processor | None = None,
        hf_config: PreTrainedConfig | None = None,
        quantization: Quantization | None = None,
    ) -> HookedLLaVA:
        """The three parts put together; on device "meta" without memory for the weights, elsewhere uninitialised."""
        with torch.device(device), _default_dtype(dtype):
            parts = VisionTower(config.vision), Projector(config.projector), LanguageTower(config.language)
        model = cls(config, *parts, processor=processor, hf_config=hf_config)
        if quantization is not None and hf_config is not None:
            quantize_linears(model, quantization.names(hf_config, config), quantization.config)
            model.setup()  # anew, since it lists the modules
        return model

    @classmethod
    def from_pretrained(
        cls,
        name: str | os.PathLike[str],
        *,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str = "cpu",
        device_map: DeviceMap | None = None,
        max_memory: Mapping[int | str, int | str] | None = None,
        quantization_config: QuantizationLike = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> HookedLLaVA:
        """Load "tiny-shapes" (embedded, offline), a local folder in Hugging Face format, or a name on the hub.

        Weights are streamed into place one tensor at a time, so loading takes once their memory.

        Args:
            name: an embedded name, a folder, or the hub's owner/name.
            dtype: of the weights, such as torch.bfloat16 or "bfloat16"; the checkpoint's by default and for "auto".
            device: where the weights go.
            device_map: instead of `device`, over several devices: "auto" or another plan of accelerate's, or a device for each
                part, such as {"": 0, "language.blocks.3": 1}; see `hooked_llava.loading.placement.placed`.
            max_memory: for a plan, the memory that it may take of each device: {0: "20GiB", "cpu": "60GiB"}.
            quantization_config: transformers' `BitsAndBytesConfig`, to keep in 8 or 4 bits the weights that transformers would.
                A checkpoint that was saved so needs none. The weights of such a model can be read, not edited.
            revision: branch, tag or commit on the hub.
            token: for the hub's gated and private models, unless you are logged in.
            cache_dir: where what comes from the hub is kept.

        Raises `CheckpointError` naming the tensor and the file, and for a checkpoint of another kind (an adapter, weights
        that GPTQ or AWQ quantized, the original code's layout); `ConfigError` for another architecture, a dtype that is not
        floating point, a quantization that is not supported, a device that is not there, and a device_map that does not fit the
        model or that the model does not fit into.

        >>> HookedLLaVA.from_pretrained("tiny-shapes", dtype="bfloat16").cfg.dtype
        torch.bfloat16
        """
        wanted = as_dtype(dtype)
        if device_map is not None and str(device) != "cpu":
            raise ConfigError(f"device={str(device)!r} and device_map={device_map!r}; give one of them.")
        check_device(device, f"device={str(device)!r}")
        folder = resolve(name, revision=revision, token=token, cache_dir=cache_dir)
        hf_config, files = read_config(folder), read_headers(folder)
        quantization, files = as_quantization(quantization_config, hf_config, files)
        config = model_config(hf_config, files.names, model_name=str(name))
        processor, why_none = load_processor(folder, hf_config.model_type)
        model = cls.build(config, device="meta", processor=processor, hf_config=hf_config, quantization=quantization)
        model.no_processor = why_none
        model.generation_config = read_generation_config(folder)
        wanted = wanted or stored_dtype(hf_config) or files.dtype
        places: Any = device
        if device_map is not None:
            places = placed(model, expected_tensors(config), device_map, dtype=wanted, max_memory=max_memory)
            for place in set(places.values()):
                check_device(place, f"device_map={device_map!r}: {place}")
        load_into(model, files, config, dtype=wanted, device=places)
        return model

    @classmethod
    def from_hf(cls, hf_model: PreTrainedModel, processor: Processor | None = None) -> HookedLLaVA:
        """A view of a LLaVA model of transformers: the same storage, in parameters of its own.

        One that accelerate has spread over several devices stays there, and weights that bitsandbytes keeps in 8 or 4 bits stay
        so. A later `.to(...)` of this model leaves the user's alone; an edit of the weights in place reaches both. Without a
        processor the model takes token ids, and text has no spans. Raises `ConfigError` for another architecture, and for
        what is no plain model in memory (adapters, offloaded weights, wrappers), saying how to come to one;
        and `InputError` for a processor that is another model's.
        """
        check_model(hf_model)
        config = model_config(hf_model.config, dict(hf_model.named_parameters()))
        quantization = quantization_of(hf_model, config)
        if processor is not None:
            check_processor_fits(processor, config)
        hf_config = hf_model.config
        model = cls.build(config, device="meta", processor=processor, hf_config=hf_config, quantization=quantization)
        model.generation_config = hf_model.generation_config
        share_weights(model, hf_model, config, None if quantization is None else quantization.packed)
        return model

    def save_pretrained(self, folder: str | os.PathLike[str], **options: Any) -> None:
        """Write a checkpoint in Hugging Face format, which plain transformers loads; see `hooked_llava.loading.save`."""
        if self.hf_config is None:
            raise CheckpointError(f"save_pretrained {missing_for('save_pretrained', self)}")
        options.setdefault("generation_config", self.generation_config)
        save(stored_state(self), self.hf_config, self.processor, os.fspath(folder), **options)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
