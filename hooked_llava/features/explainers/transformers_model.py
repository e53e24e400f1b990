"""An image-text-to-text model of transformers as an explainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from hooked_llava.checks import whole_number


class TransformersExplainer:
    """A model in this process that answers prompts about images: any that `AutoModelForImageTextToText` loads.

    Its processor needs a chat template. The answer is what the model finds most probable, token by token.

    Args:
        model: the model.
        processor: its processor.
        max_new_tokens: so long is an answer at most.

    >>> from hooked_llava.loading.embedded import embedded_folder
    >>> explainer = TransformersExplainer.from_pretrained(embedded_folder("tiny-shapes"), max_new_tokens=3)
    >>> isinstance(explainer([Image.new("RGB", (64, 64))], "What color is the star?"), str)
    True
    """

    def __init__(self, model: Any, processor: Any, *, max_new_tokens: int = 128) -> None:
        self.model, self.processor = model, processor
        self.max_new_tokens = whole_number(max_new_tokens, "max_new_tokens", least=1)

    @classmethod
    def from_pretrained(
        cls,
        name: Any,
        *,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        max_new_tokens: int = 128,
        **options: Any,
    ) -> TransformersExplainer:
        """Load a model and its processor, from a folder or the hub; further options go to the model's `from_pretrained`."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, **options)
        if "device_map" not in options:
            torch.nn.Module.to(model, device)
        return cls(model.eval(), AutoProcessor.from_pretrained(name), max_new_tokens=max_new_tokens)

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompt: str) -> str:
        """The model's answer to a prompt that is followed by images, perhaps none."""
        content = [{"type": "text", "text": prompt}, *({"type": "image", "image": image} for image in images)]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.model.device, dtype=self.model.dtype)
        generated = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        answer = generated[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(answer, skip_special_tokens=True).strip()
