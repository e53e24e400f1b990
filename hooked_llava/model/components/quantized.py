"""Linear maps whose weight is kept in 8 or 4 bits, as bitsandbytes keeps it and with its kernels.

8 bits: LLM.int8() (Dettmers et al. 2022, arXiv 2208.07339), a scale for each row, activations rounded to 8 bits too. 4 bits:
NF4 and FP4 (Dettmers et al. 2023, arXiv 2305.14314), a scale for each block of 64 numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.errors import CheckpointError
from hooked_llava.loading.packed import CODES, FORMAT, SCALES, STATE, PackedWeight

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState
    from transformers import BitsAndBytesConfig

# Numbers that share a scale, and scales that share one: as bitsandbytes packs by default.
_BLOCK, _NESTED_BLOCK = 64, 256
_N_NESTED_CODES = 256
_N_LEVELS = 16


class QuantizedLinear(nn.Linear, ABC):
    """A linear map that keeps its weight packed. `weight` is dequantized whenever it is read, and writing to it is lost.

    It moves with the model. Where the model is cast (`model.to(torch.bfloat16)`), the packed numbers stay as they are.
    """

    bits: ClassVar[int]
    like: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        nn.Module.__init__(self)  # not nn.Linear's, which makes a weight
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._like(linear.weight)

    @property
    def weight(self) -> Float[Tensor, "out in"]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The weight, dequantized in the model's dtype: a new tensor each time."""
        return self.dequantized(self.like.dtype)

    @abstractmethod
    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """The weight in a dtype."""

    @abstractmethod
    def keep_weight(self, weight: Tensor | PackedWeight) -> None:
        """Pack a weight [out in] on its device and keep it in this one's place; or keep one that is packed.

        Raises `CheckpointError` for a packed weight of another kind or shape.
        """

    @abstractmethod
    def packed(self) -> PackedWeight:
        """What is kept, by the names that bitsandbytes gives it."""

    def _like(self, weight: Tensor, dtype: torch.dtype | None = None) -> None:
        """A tensor without numbers, which follows the model from device to device and from dtype to dtype."""
        self.register_buffer("like", weight.new_empty(0, dtype=dtype), persistent=False)

    def _keep(self, **tensors: Tensor | None) -> None:
        for name, tensor in tensors.items():
            parameter = None if tensor is None else nn.Parameter(tensor.detach(), requires_grad=False)
            setattr(self, name, parameter)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedLinear:
        """Scales are shown to a cast as integers, which it leaves alone."""

        def moved(tensor: Tensor) -> Tensor:
            if tensor is self.bias or tensor is self.like or not tensor.is_floating_point():
                return fn(tensor)
            return fn(tensor.view(torch.int32)).view(tensor.dtype)

        return super()._apply(moved, recurse)

    def _wrong(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"A packed weight of [{self.out_features}, {self.in_features}] {what}. Its files belong to another model or are "
            "damaged: save the model again with save_pretrained of transformers."
        )


class Linear8Bit(QuantizedLinear):
    """A linear map in 8 bits: codes [out in], and for each output a scale that 127 stands for.

    Each input vector is rounded to 8 bits by its own largest number. Columns of the input with a number of `threshold` or
    more, in any vector that is computed at once, are multiplied apart and are not rounded; 0 for none.
    """

    bits = 8
    codes: nn.Parameter
    scales: nn.Parameter

    def __init__(self, linear: nn.Linear, threshold: float) -> None:
        super().__init__(linear)
        self.threshold = threshold
        n_out, n_in = linear.weight.shape
        device = linear.weight.device
        self._keep(
            codes=torch.empty(n_out, n_in, dtype=torch.int8, device=device), scales=torch.empty(n_out, device=device)
        )

    def keep_weight(self, weight: Tensor | PackedWeight) -> None:
        """See `QuantizedLinear`."""
        if isinstance(weight, PackedWeight):
            codes, scales = weight.parts[CODES], weight.parts.get(SCALES)
            if scales is None or codes.dtype != torch.int8 or codes.shape != self.codes.shape:
                raise self._wrong(
                    f"should be int8 of that shape, with scales (SCB); got {codes.dtype} {tuple(codes.shape)}"
                )
            self._like(codes, weight.dtype)
        else:
            from bitsandbytes.functional import int8_vectorwise_quant

            codes, scales, _ = int8_vectorwise_quant(weight.detach().to(torch.float16, copy=True).contiguous())
            self._like(weight)
        self._keep(codes=codes, scales=scales)

    def packed(self) -> PackedWeight:
        """See `QuantizedLinear`."""
        by_rows = torch.tensor(0, dtype=torch.uint8)  # the one order that bitsandbytes still writes
        return PackedWeight({CODES: self.codes.data, SCALES: self.scales.data, FORMAT: by_rows}, self.like.dtype)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """See `QuantizedLinear`."""
        return (self.codes * (self.scales / 127.0)[:, None]).to(dtype)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The product of rounded numbers, as bitsandbytes computes it; gradients as if the input were not rounded."""
        product: Tensor = _Int8Product.apply(x.reshape(-1, self.in_features), self)  # type: ignore[assignment]
        return product.view(*x.shape[:-1], self.out_features)

    def product(self, x: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """The product, without gradients."""
        import bitsandbytes  # noqa: F401 (registers its operators)
        from bitsandbytes.functional import int8_vectorwise_quant

        ops = torch.ops.bitsandbytes
        bias = None if self.bias is None else self.bias.to(x.dtype)
        if not x.numel():
            return x.new_zeros(len(x), self.out_features)
        # a copy, since columns beyond the threshold are set to 0 in it for a moment
        rounded, scales, apart = int8_vectorwise_quant(x.to(torch.float16, copy=True), threshold=self.threshold)
        if self.threshold == 0:
            return ops.int8_scaled_mm.default(rounded, self.codes, scales, self.scales, bias=bias, dtype=x.dtype)
        return ops.int8_mixed_scaled_mm(x, rounded, self.codes, scales, self.scales, apart, bias)[0]


class _Int8Product(torch.autograd.Function):
    """bitsandbytes' own logs a warning with every call that is not in float16, which no model is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear8Bit) -> Tensor:
        ctx.layer = layer
        return layer.product(x.detach())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient @ ctx.layer.dequantized(gradient.dtype), None


class Linear4Bit(QuantizedLinear):
    """A linear map in 4 bits: codes two in a byte, a scale `absmax` for each block, which may be in 8 bits itself.

    What is multiplied is the dequantized weight, in `compute_dtype`; None for the input's own dtype.
    """

    bits = 4
    codes: nn.Parameter
    absmax: nn.Parameter
    levels: Tensor
    nested_absmax: nn.Parameter | None
    offset: nn.Parameter | None

    def __init__(self, linear: nn.Linear, kind: str, compute_dtype: torch.dtype | None, nested: bool) -> None:
        super().__init__(linear)
        self.kind, self.compute_dtype, self.nested, self.block = kind, compute_dtype, nested, _BLOCK
        n_blocks, device = -(-linear.weight.numel() // _BLOCK), linear.weight.device
        n_nested = -(-n_blocks // _NESTED_BLOCK)
        self._keep(
            codes=torch.empty((linear.weight.numel() + 1) // 2, 1, dtype=torch.uint8, device=device),
            absmax=torch.empty(n_blocks, dtype=torch.uint8 if nested else torch.float32, device=device),
            nested_absmax=torch.empty(n_nested, device=device) if nested else None,
            offset=torch.empty((), device=device) if nested else None,
        )
        self.register_buffer("nested_codes", torch.empty(_N_NESTED_CODES, device=device) if nested else None)
        self._with_levels(torch.empty(_N_LEVELS, device=device))

    def keep_weight(self, weight: Tensor | PackedWeight) -> None:
        """See `QuantizedLinear`."""
        from bitsandbytes.functional import QuantState, quantize_4bit

        if isinstance(weight, PackedWeight):
            codes = weight.parts[CODES].view(torch.uint8)  # FSDP may have had it stored as another dtype
            rest = {name: part for name, part in weight.parts.items() if name.startswith(f"{CODES}.")}
            if not any(name.startswith(STATE) for name in rest):
                raise self._wrong(f"should come with its {STATE}{self.kind}; got {sorted(weight.parts)}")
            state = QuantState.from_dict({name.removeprefix(f"{CODES}."): p for name, p in rest.items()}, codes.device)
            if tuple(state.shape or ()) != (self.out_features, self.in_features):
                raise self._wrong(f"is of shape {tuple(state.shape or ())}")
            self._like(codes, weight.dtype)
        else:
            codes, state = quantize_4bit(
                weight.detach().contiguous(), blocksize=_BLOCK, compress_statistics=self.nested, quant_type=self.kind
            )
            self._like(weight)
        self._keep_state(codes, state)

    def _keep_state(self, codes: Tensor, state: QuantState) -> None:
        from bitsandbytes.functional import get_4bit_type

        self.kind, self.block, self.nested = str(state.quant_type), state.blocksize, state.nested
        nested = state.state2 if state.nested else None
        self._keep(
            codes=codes.reshape(-1, 1),
            absmax=state.absmax,
            nested_absmax=None if nested is None else nested.absmax,
            offset=None if nested is None else state.offset,
        )
        self.register_buffer("nested_codes", None if nested is None else nested.code.clone())
        self._with_levels(get_4bit_type(self.kind, device=codes.device))

    def _with_levels(self, levels: Float[Tensor, " level"]) -> None:
        """The numbers that the codes stand for; kept, since every product needs them, and sending them to a device waits."""
        self.register_buffer("levels", levels, persistent=False)

    def state(self, dtype: torch.dtype) -> QuantState:
        """What bitsandbytes wants to know of the codes, to make numbers of that dtype from them."""
        from bitsandbytes.functional import QuantState

        nested = None
        if self.nested:
            nested = QuantState(
                self.nested_absmax, code=self.nested_codes, blocksize=_NESTED_BLOCK, dtype=torch.float32
            )
        return QuantState(
            self.absmax.data,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.levels,
            blocksize=self.block,
            quant_type=self.kind,
            dtype=dtype,
            offset=self.offset,
            state2=nested,
        )

    def packed(self) -> PackedWeight:
        """See `QuantizedLinear`."""
        rest = self.state(self.like.dtype).as_dict(packed=True)
        parts = {CODES: self.codes.data, **{f"{CODES}.{name}": part.detach() for name, part in rest.items()}}
        return PackedWeight(parts, self.like.dtype)

    def dequantized(self, dtype: torch.dtype) -> Float[Tensor, "out in"]:
        """See `QuantizedLinear`."""
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.codes.data, self.state(dtype))

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The product with the dequantized weight, in the dtype of x."""
        from bitsandbytes import matmul_4bit

        dtype = self.compute_dtype or x.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        return matmul_4bit(x.to(dtype), self.codes.data, quant_state=self.state(dtype), bias=bias).to(x.dtype)


def quantize_linears(module: nn.Module, names: Iterable[str], config: BitsAndBytesConfig) -> None:
    """Put a linear map that keeps its weight in few bits in the place of each named weight's, with nothing in it yet."""
    for name in names:
        path = name.removesuffix(".weight")
        linear = module.get_submodule(path)
        assert isinstance(linear, nn.Linear), name
        module.set_submodule(path, quantized_linear(linear, config))


def quantized_linear(linear: nn.Linear, config: BitsAndBytesConfig) -> QuantizedLinear:
    """A linear map of the same sizes, on the same device, that keeps its weight as a config says."""
    if config.load_in_8bit:
        return Linear8Bit(linear, float(config.llm_int8_threshold))
    kind, dtype = config.bnb_4bit_quant_type, config.bnb_4bit_compute_dtype
    return Linear4Bit(linear, kind, dtype, nested=config.bnb_4bit_use_double_quant)


def quantized_linears(module: nn.Module) -> dict[str, QuantizedLinear]:
    """The linear maps below a module that keep their weights in few bits, by their paths."""
    return {path: linear for path, linear in module.named_modules() if isinstance(linear, QuantizedLinear)}


def like_weight(linear: nn.Linear) -> Tensor:
    """A tensor of the dtype and on the device of a linear map's weight, for which none is dequantized."""
    return linear.like if isinstance(linear, QuantizedLinear) else linear.weight


def bias_or_zeros(linear: nn.Linear) -> Float[Tensor, " out"]:
    """The bias of a linear map, zeros if there is none."""
    return like_weight(linear).new_zeros(linear.out_features) if linear.bias is None else linear.bias


def stored_state(module: nn.Module) -> dict[str, Tensor]:
    """The weights of a module as a checkpoint holds them: its state dict, packed weights by bitsandbytes' names."""
    state = module.state_dict()
    for path, linear in quantized_linears(module).items():
        for name in linear.state_dict():
            if name != "bias":
                del state[f"{path}.{name}"]
        state |= {f"{path}.{name}": part for name, part in linear.packed().parts.items()}
    return state
