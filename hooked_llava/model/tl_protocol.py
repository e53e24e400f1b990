"""The surface that TransformerLens's tools expect of a model, and its users with them.

`HookedLLaVA` inherits it. Everything here describes the language tower: weights in TransformerLens's orientation,
directions in the residual stream, and strings to tokens and back.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import FactoredMatrix

from hooked_llava.architecture.config import LLaVAConfig
from hooked_llava.architecture.missing_hooks import SIDE_BY_SIDE
from hooked_llava.errors import InputError
from hooked_llava.machine.devices import to_device
from hooked_llava.model.components.block import Blocks, ParallelBlock
from hooked_llava.model.components.norm import LayerNorm, RMSNorm
from hooked_llava.model.language import LanguageTower
from hooked_llava.prompt.inputs import Inputs
from hooked_llava.prompt.processor import Processor, Tokenizer
from hooked_llava.prompt.requirements import without_processor


@dataclass(frozen=True)
class ConfigView:
    """`model.cfg`: the three parts' configs, and the language tower's fields under TransformerLens's names."""

    config: LLaVAConfig
    device: torch.device
    dtype: torch.dtype
    use_attn_result: bool = True
    use_split_qkv_input: bool = True
    use_hook_mlp_in: bool = True
    use_attn_in: bool = False
    default_prepend_bos: bool = True
    positional_embedding_type: str = "rotary"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # copy and pickle probe for these before `config` exists
            raise AttributeError(name)
        for part in (self.config, self.config.language):
            if hasattr(part, name):
                return getattr(part, name)
        raise AttributeError(f"The config has no field {name!r}; see cfg.vision, cfg.projector and cfg.language.")


def sum_biases(
    blocks: Blocks, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
) -> Float[Tensor, " d_model"]:
    """Sum of all output biases of a tower below a layer (with `mlp_input`, below its MLP)."""
    if mlp_input and isinstance(blocks[0], ParallelBlock):
        raise InputError(f"mlp_input=True: {SIDE_BY_SIDE}. Leave it out.")
    total = torch.zeros_like(blocks[0].attn.b_O)  # (d_model)
    for i, block in enumerate(itertools.islice(blocks, layer + mlp_input)):
        total = total + block.attn.b_O.to(total.device)
        if include_mlp_biases and i < layer:
            total = total + block.mlp.b_out.to(total.device)
    return total


def _stacked(name: str, meaning: str) -> Any:
    """A property of a model: one weight of every layer, stacked in a new tensor each time."""

    def stack(self: TransformerLensSurface) -> Tensor:
        return self.stack_weights(name)

    return property(stack, doc=f"{meaning}; stacked when read.")


class TransformerLensSurface(nn.Module):
    """Weights, directions and tokens of the language tower, named as in TransformerLens."""

    config: LLaVAConfig
    language: LanguageTower
    processor: Processor | None
    no_processor: str

    @property
    def cfg(self) -> ConfigView:
        """Sizes of the model, its device and dtype."""
        weight = self.language.embed.weight
        return ConfigView(self.config, weight.device, weight.dtype)

    @property
    def tokenizer(self) -> Tokenizer:
        """The processor's tokenizer; raises `InputError` if the model came without a processor."""
        if self.processor is None:
            raise InputError(f"Text {without_processor(self.no_processor)}")
        return self.processor.tokenizer

    @property
    def blocks(self) -> Blocks:
        """Blocks of the language tower."""
        return self.language.blocks

    @property
    def ln_final(self) -> RMSNorm | LayerNorm:
        """Norm before the unembedding."""
        return self.language.ln_final

    @property
    def unembed(self) -> nn.Linear:
        """Map from the normalized final residual stream to the logits."""
        return self.language.unembed

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """Token embedding, a view."""
        return self.language.embed.weight

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """Unembedding, a view; the final norm's weight is not folded in."""
        return self.language.unembed.weight.T

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """Unembedding bias, zeros if there is none."""
        bias = self.language.unembed.bias
        return self.W_U.new_zeros(self.config.language.d_vocab) if bias is None else bias

    def blocks_with(self, submodule: str) -> list[tuple[int, nn.Module]]:
        """Every layer whose block has a part of this name ("attn", "mlp"), with the block."""
        return [(layer, block) for layer, block in enumerate(self.blocks) if submodule in dict(block.named_children())]

    def stack_weights(self, name: str) -> Tensor:
        """One weight of every layer, stacked in a new tensor: "W_Q", "b_O", "W_in", ... -> [layer ...]."""
        part = "mlp" if name.endswith(("_in", "_gate", "_out")) else "attn"
        return torch.stack([getattr(getattr(block, part), name).to(self.cfg.device) for block in self.blocks])

    W_Q = _stacked("W_Q", "Query weights of all layers, [layer head d_model d_head]")
    W_K = _stacked("W_K", "Key weights of all layers, one for each key-value head, [layer kv_head d_model d_head]")
    W_V = _stacked("W_V", "Value weights of all layers, one for each key-value head, [layer kv_head d_model d_head]")
    W_O = _stacked("W_O", "Output weights of all layers, [layer head d_head d_model]")
    b_Q = _stacked("b_Q", "Query biases of all layers, [layer head d_head]")
    b_K = _stacked("b_K", "Key biases of all layers, [layer kv_head d_head]")
    b_V = _stacked("b_V", "Value biases of all layers, [layer kv_head d_head]")
    b_O = _stacked("b_O", "Attention output biases of all layers, [layer d_model]")
    W_in = _stacked("W_in", "MLP input weights of all layers, [layer d_model d_mlp]")
    W_gate = _stacked("W_gate", "MLP gate weights of all layers, [layer d_model d_mlp]")
    W_out = _stacked("W_out", "MLP output weights of all layers, [layer d_mlp d_model]")
    b_in = _stacked("b_in", "MLP input biases of all layers, [layer d_mlp]")
    b_out = _stacked("b_out", "MLP output biases of all layers, [layer d_model]")

    @property
    def QK(self) -> FactoredMatrix:
        """W_Q W_K^T of every layer and head, [layer head d_model d_model], without rotary positions."""
        return FactoredMatrix(self.W_Q, self._for_each_query_head(self.W_K).transpose(-1, -2))

    @property
    def OV(self) -> FactoredMatrix:
        """W_V W_O of every layer and head, [layer head d_model d_model]."""
        return FactoredMatrix(self._for_each_query_head(self.W_V), self.W_O)

    def _for_each_query_head(self, weights: Tensor, dim: int = 1) -> Tensor:
        language = self.config.language
        groups = language.n_heads // language.n_key_value_heads
        return weights if groups == 1 else weights.repeat_interleave(groups, dim=dim)

    def tl_parameters(self) -> dict[str, Tensor]:
        """Weights under TransformerLens's names ("blocks.3.attn.W_V", "unembed.W_U"): views, as `SVDInterpreter` reads them.

        Keys and values of a grouped-query model are repeated, one for each query head, in new tensors.

        >>> from hooked_llava import HookedLLaVA
        >>> weights = HookedLLaVA.from_pretrained("tiny-shapes").tl_parameters()
        >>> weights["blocks.0.mlp.W_in"].shape
        torch.Size([128, 384])
        """
        weights = {
            "embed.W_E": self.W_E,
            "unembed.W_U": self.W_U,
            "unembed.b_U": self.b_U,
            "ln_final.w": self.ln_final.w,
        }
        mlp = ("W_in", "W_out", "b_in", "b_out") + (("W_gate",) if self.config.language.gated_mlp else ())
        for i, block in enumerate(self.blocks):
            norms = {"ln1": block.ln1} if isinstance(block, ParallelBlock) else {"ln1": block.ln1, "ln2": block.ln2}
            weights |= {f"blocks.{i}.{name}.w": norm.w for name, norm in norms.items()}
            weights |= {f"blocks.{i}.attn.{name}": getattr(block.attn, name) for name in ("W_Q", "b_Q", "W_O", "b_O")}
            for name in ("W_K", "b_K", "W_V", "b_V"):
                weights[f"blocks.{i}.attn.{name}"] = self._for_each_query_head(getattr(block.attn, name), dim=0)
            weights |= {f"blocks.{i}.mlp.{name}": getattr(block.mlp, name) for name in mlp}
        return weights

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of all output biases below a layer (with `mlp_input`, below its MLP)."""
        return sum_biases(self.blocks, layer, mlp_input, include_mlp_biases).to(self.cfg.device)

    def tokens_to_residual_directions(
        self, tokens: str | int | Int[Tensor, "*shape"]
    ) -> Float[Tensor, "*shape d_model"]:
        """Direction whose dot product with (final residual stream / its scale) is the token's logit.

        It is the token's unembedding times the final norm's weight (centered, where the norm is a LayerNorm); because that
        is part of the direction, `ActivationCache.logit_attrs` sums to the logit on raw weights. A LayerNorm's bias has no
        direction: the logit is that sum and `ln_final.b @ W_U`; nor has an unembedding's, `b_U`.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        unembedding = F.embedding(to_device(torch.as_tensor(ids), self.W_U.device), self.W_U.T)
        return self.ln_final.direction(unembedding).to(self.cfg.device)

    def to_tokens(
        self,
        text: str | Sequence[str] | Inputs,
        prepend_bos: bool | None = None,
        padding_side: str | None = None,
        *,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"] | Inputs:
        """Token ids of one or several texts, as the tokenizer makes them (images are not expanded; use `prepare`).

        None stands for the default: the beginning token is prepended, and texts are padded on the left. With `truncate` a
        text ends where the model's positions do. `Inputs` are returned as they are: they are what stands for tokens where a
        TransformerLens tool is given a prompt.
        """
        if isinstance(text, Inputs):
            return text.to(self.cfg.device)
        texts = [text] if isinstance(text, str) else list(text)
        encoded = self.tokenizer(
            texts,
            add_special_tokens=self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos,
            padding=len(texts) > 1,
            padding_side=padding_side or "left",
            return_tensors="pt",
            **({"truncation": True, "max_length": self.config.language.n_ctx} if truncate else {}),
        )
        return encoded["input_ids"].to(self.cfg.device)

    def to_string(self, tokens: int | Sequence[int] | Int[Tensor, "*shape"]) -> str | list[str]:
        """Text of a token or row of tokens; a list of texts for a batch."""
        ids = torch.as_tensor(tokens)
        if ids.ndim == 2:
            return self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)
        return self.tokenizer.decode(ids.reshape(-1), clean_up_tokenization_spaces=False)

    def to_str_tokens(
        self,
        tokens: str | Sequence[int] | Int[Tensor, "*shape"] | Inputs | Mapping[str, Any],
        prepend_bos: bool | None = None,
    ) -> list[str]:
        """Each token of one text, one row of ids, or one prompt's inputs (image tokens and padding included) as a string.

        Raises `InputError` for several rows, and for what is no token.
        """
        given = tokens.get("input_ids") if isinstance(tokens, Mapping) else getattr(tokens, "input_ids", tokens)
        try:
            ids = self.to_tokens(given, prepend_bos) if isinstance(given, str) else torch.as_tensor(given)
        except (TypeError, ValueError, RuntimeError):
            raise InputError(
                f"to_str_tokens takes one text, one row of token ids or the inputs of one prompt, got {tokens!r:.80}; call it "
                "once for each."
            ) from None
        if ids.ndim == 2 and ids.shape[0] != 1:
            raise InputError(
                f"to_str_tokens takes one row of tokens, got {ids.shape[0]}; call it row by row, such as "
                "[model.to_str_tokens(row) for row in inputs]."
            )
        return [self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in ids.reshape(-1).tolist()]

    def to_single_token(self, text: str) -> int:
        """Id of a text that is exactly one token; raises `InputError` with its pieces otherwise."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            pieces = [self.tokenizer.decode([i]) for i in ids]
            known = self.tokenizer.unk_token_id not in ids
            what = f"is not a single token: it becomes {pieces}" if known else f"is not in the vocabulary ({pieces})"
            raise InputError(f"{text!r} {what}. Give a word of the vocabulary (to_str_tokens shows how a text is cut).")
        return ids[0]

    def set_use_attn_result(self, use_attn_result: bool) -> None:
        """Does nothing: the hook fires whenever it is hooked. TransformerLens's tools call it."""

    def set_use_split_qkv_input(self, use_split_qkv_input: bool) -> None:
        """Does nothing: the hooks fire whenever they are hooked. TransformerLens's tools call it."""

    def set_use_hook_mlp_in(self, use_hook_mlp_in: bool) -> None:
        """Does nothing: the hook fires whenever it is hooked. TransformerLens's tools call it."""

    def set_use_attn_in(self, use_attn_in: bool) -> None:
        """Does nothing: there is no joint attention input, only `hook_q_input`, `hook_k_input` and `hook_v_input`."""
