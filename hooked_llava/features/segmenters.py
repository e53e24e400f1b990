"""The pixels that a phrase names in an image, by GroundingDINO and SAM of transformers."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor

from hooked_llava.checks import finite_number


class GroundedSegmenter:
    """GroundingDINO finds boxes of what a phrase names, SAM the pixels in each (Zhang et al. 2411.14982, section 4.1).

    The mask is the union over boxes, and empty where nothing is found. Of SAM's three proposals for a box the one counts that
    SAM rates best; the released code takes their union.

    Args:
        detector: a GroundingDINO.
        detector_processor: its processor.
        segmenter: a SAM.
        segmenter_processor: its processor.
        threshold: least probability of a box, 0 to 1; the released code's is 0.3.
    """

    def __init__(
        self,
        detector: Any,
        detector_processor: Any,
        segmenter: Any,
        segmenter_processor: Any,
        *,
        threshold: float = 0.3,
    ) -> None:
        self.detector, self.detector_processor = detector, detector_processor
        self.segmenter, self.segmenter_processor = segmenter, segmenter_processor
        self.threshold = finite_number(threshold, "threshold", least=0.0)

    @classmethod
    def from_pretrained(
        cls,
        detector: Any = "IDEA-Research/grounding-dino-base",
        segmenter: Any = "facebook/sam-vit-huge",
        *,
        threshold: float = 0.3,
        device: torch.device | str = "cpu",
    ) -> GroundedSegmenter:
        """Load both models and their processors, from folders or the hub.

        The defaults are the released code's; the paper names GroundingDINO "L", which has no open weights.
        """
        from transformers import AutoModelForMaskGeneration, AutoModelForZeroShotObjectDetection, AutoProcessor

        finds = AutoModelForZeroShotObjectDetection.from_pretrained(detector).to(device).eval()
        cuts = AutoModelForMaskGeneration.from_pretrained(segmenter).to(device).eval()
        processors = [AutoProcessor.from_pretrained(name) for name in (detector, segmenter)]
        return cls(finds, processors[0], cuts, processors[1], threshold=threshold)

    @torch.no_grad()
    def __call__(self, image: Image.Image, phrase: str) -> Bool[np.ndarray, "height width"]:
        """The pixels of the image that the phrase names."""
        image = image.convert("RGB")
        boxes = self.boxes(image, phrase)
        if not len(boxes):
            return np.zeros((image.height, image.width), dtype=np.bool_)
        return self.masks(image, boxes).any(0).cpu().numpy()

    def boxes(self, image: Image.Image, phrase: str) -> Float[Tensor, "box 4"]:
        """Where the detector finds what the phrase names: (x0, y0, x1, y1) in pixels."""
        text = f"{phrase.strip().rstrip('.').lower()}."
        inputs = self.detector_processor(images=image, text=text, return_tensors="pt").to(self.detector.device)
        found = self.detector_processor.post_process_grounded_object_detection(
            self.detector(**inputs),
            inputs["input_ids"],
            threshold=self.threshold,
            text_threshold=self.threshold,
            target_sizes=[(image.height, image.width)],
        )
        return found[0]["boxes"].float()

    def masks(self, image: Image.Image, boxes: Float[Tensor, "box 4"]) -> Bool[Tensor, "box height width"]:
        """The pixels of what lies in each box."""
        inputs = self.segmenter_processor(
            images=image, input_boxes=[boxes.cpu().tolist()], return_tensors="pt"
        ).to(self.segmenter.device)  # fmt: skip
        outputs = self.segmenter(**inputs)
        (proposals,) = self.segmenter_processor.post_process_masks(
            outputs.pred_masks.cpu(), inputs["original_sizes"].cpu(), inputs["reshaped_input_sizes"].cpu()
        )
        best = outputs.iou_scores[0].argmax(-1).cpu()
        return proposals[torch.arange(len(best)), best].bool()
