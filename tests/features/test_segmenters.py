"""GroundingDINO and SAM, tiny and random, saved and loaded here; boxes and masks against their raw outputs by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate
from transformers import (
    BertTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    SamConfig,
    SamModel,
    SamProcessor,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.sam.image_processing_pil_sam import SamImageProcessorPil

from hooked_llava.errors import InputError
from hooked_llava.features.segmenters import GroundedSegmenter

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "?", "the", "red", "star", "blue", "ring"]
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    detector, segmenter = tmp_path_factory.mktemp("detector"), tmp_path_factory.mktemp("segmenter")
    (detector / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    heads: Any = {
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_n_points": 2,
        "decoder_n_points": 2,
    }
    config = GroundingDinoConfig(
        backbone_config={
            "model_type": "swin", "image_size": 128, "patch_size": 4, "embed_dim": 8, "depths": [1] * 4,
            "num_heads": [1, 1, 2, 2], "window_size": 4, "out_features": ["stage2", "stage3", "stage4"],
        },
        text_config={
            "model_type": "bert", "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 16, "max_position_embeddings": 64,
        },
        d_model=32, encoder_layers=1, decoder_layers=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=8,
        max_text_len=16, **heads,
    )  # fmt: skip
    GroundingDinoForObjectDetection(config).save_pretrained(detector)
    images = GroundingDinoImageProcessorPil(size={"height": 128, "width": 128})
    GroundingDinoProcessor(images, BertTokenizer(str(detector / "vocab.txt"))).save_pretrained(detector)
    config = SamConfig(
        vision_config={
            "hidden_size": 16, "output_channels": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 64,
            "patch_size": 16, "mlp_dim": 16, "num_pos_feats": 4, "global_attn_indexes": [0], "window_size": 2,
        },
        prompt_encoder_config={"hidden_size": 8, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 8, "mlp_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 8,
            "iou_head_depth": 2,
        },
    )  # fmt: skip
    SamModel(config).save_pretrained(segmenter)
    masks: Any = {"mask_size": {"longest_edge": 16}, "mask_pad_size": {"height": 16, "width": 16}}
    resized = SamImageProcessorPil(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64}, **masks)
    SamProcessor(resized).save_pretrained(segmenter)
    return detector, segmenter


def loaded(folders: tuple[Path, Path], threshold: float = 0.3) -> GroundedSegmenter:
    return GroundedSegmenter.from_pretrained(*folders, threshold=threshold)


@torch.no_grad()
def test_boxes_are_the_detectors(folders: tuple[Path, Path]) -> None:
    one = loaded(folders)
    inputs = one.detector_processor(images=IMAGE, text="red star.", return_tensors="pt")
    outputs = one.detector(**inputs)
    scores = outputs.logits[0].sigmoid().max(-1).values
    for threshold in (0.3, float(scores.median())):
        expected = []
        for (cx, cy, w, h), score in zip(outputs.pred_boxes[0].tolist(), scores.tolist(), strict=True):
            if score > threshold:
                expected.append([(cx - w / 2) * 80, (cy - h / 2) * 48, (cx + w / 2) * 80, (cy + h / 2) * 48])
        one.threshold = threshold
        for phrase in ("Red star", "red star.", " red star "):
            torch.testing.assert_close(one.boxes(IMAGE, phrase), torch.tensor(expected), atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_masks_are_the_proposals_that_sam_rates_best(folders: tuple[Path, Path]) -> None:
    one = loaded(folders)
    boxes = torch.tensor([[1.0, 2.0, 30.0, 40.0], [0.0, 0.0, 20.0, 20.0], [40.0, 10.0, 79.0, 47.0]])
    inputs = one.segmenter_processor(images=IMAGE, input_boxes=[boxes.tolist()], return_tensors="pt")
    outputs = one.segmenter(**inputs)
    found = one.masks(IMAGE, boxes)
    assert found.shape == (3, 48, 80)
    for i in range(3):
        best = int(outputs.iou_scores[0, i].argmax())
        large = interpolate(outputs.pred_masks[0, i, best][None, None], (64, 64), mode="bilinear")
        rows, columns = inputs["reshaped_input_sizes"][0].tolist()  # the rest is padding
        own = interpolate(large[..., :rows, :columns], (48, 80), mode="bilinear")[0, 0] > 0
        assert (found[i] == own).float().mean() > 0.999


def test_the_mask_is_the_union_over_boxes(folders: tuple[Path, Path]) -> None:
    one = loaded(folders)
    boxes = one.boxes(IMAGE, "red star")
    assert len(boxes) > 1
    mask = one(IMAGE, "red star")
    assert mask.dtype == np.bool_
    assert (mask == one.masks(IMAGE, boxes).numpy().any(0)).all()
    assert (one(IMAGE.convert("RGBA"), "red star") == mask).all()


def test_nothing_found_is_an_empty_mask(folders: tuple[Path, Path]) -> None:
    mask = loaded(folders, threshold=1.0)(IMAGE, "red star")
    assert mask.shape == (48, 80)
    assert not mask.any()


def test_bad_threshold() -> None:
    with pytest.raises(InputError, match="threshold=-1"):
        GroundedSegmenter(None, None, None, None, threshold=-1)
