"""How well images fit a phrase, by a CLIP of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from hooked_llava.model.components.precision import at_least_float32


class ClipSimilarity:
    """100 times the cosine between CLIP's embeddings of each image and of a phrase (Hessel et al. 2104.08718).

    Texts longer than CLIP's context are cut. Zhang et al. (2411.14982) name ViT-B/32; their released code takes ViT-B/16, and
    torchmetrics' `CLIPScore`, which sets negative means to 0.

    Args:
        model: a CLIP, or a model like it, with `get_image_features` and `get_text_features`.
        processor: its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self.model, self.processor = model, processor

    @classmethod
    def from_pretrained(
        cls, name: Any = "openai/clip-vit-base-patch32", *, device: torch.device | str = "cpu"
    ) -> ClipSimilarity:
        """Load a CLIP and its processor, from a folder or the hub."""
        from transformers import AutoModel, AutoProcessor

        return cls(AutoModel.from_pretrained(name).to(device).eval(), AutoProcessor.from_pretrained(name))

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], phrase: str) -> list[float]:
        """The score of every image, -100 to 100."""
        inputs = self.processor(
            text=[phrase], images=[image.convert("RGB") for image in images], return_tensors="pt", padding=True,
            truncation=True,
        ).to(self.model.device)  # fmt: skip
        of_images = self.model.get_image_features(pixel_values=inputs["pixel_values"])
        of_text = self.model.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return (100 * _unit(of_images) @ _unit(of_text)[0]).tolist()


def _unit(embedded: Any) -> Float[Tensor, "row d"]:
    """Embeddings of length 1; transformers gives them bare or as a model's output."""
    vectors = at_least_float32(getattr(embedded, "pooler_output", embedded))
    return vectors / vectors.norm(dim=-1, keepdim=True)
