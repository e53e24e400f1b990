"""Image embeddings drawn towards words: the tiny counterpart of CLIP's alignment of images with text."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, pad, unfold
from transformers import LlavaForConditionalGeneration

from hooked_llava.toy.processor import IMAGE, vocabulary
from hooked_llava.toy.scenes import COLOR_NAMES, PATCH_GRID, PATCH_SIZE, PATTERNS, SHAPES, Scene

_PATTERN_GAIN = 0.7
_PLACE_GAIN = 0.5
_MARK_GAIN = 0.5  # how much of `<image>` every patch carries, which tells an image of a star from the word
_BACKGROUND_WEIGHT = 0.1
_NAMING_WEIGHT = 0.5
_NAMING_SCALE = 4.0  # a patch embedding is as long as a word, so its products with words are too small for a softmax
_AROUND = 3 * PATCH_SIZE // 2  # the neighbourhood's width at half resolution
_VOCAB = vocabulary()


@dataclass
class Alignment:
    """How far image embeddings are from their words: the loss, and the share of object patches that name them right."""

    loss: Tensor
    shape_accuracy: float
    color_accuracy: float


class OutlineHeads(nn.Module):
    """Two linear read-outs, used only in the first stage: the silhouette inside each patch, and in the 3 x 3 around it.

    Without them shape stays at chance for a long time: the tower has to find out first that outlines matter, whatever
    the colour.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inside = nn.Linear(width, PATCH_SIZE**2)
            self.around = nn.Linear(width, _AROUND**2)

    def forward(self, hidden: tuple[Tensor, ...], scenes: list[Scene]) -> Tensor:
        """The loss of both, given the tower's hidden states [image, 65, width] by layer."""
        masks = torch.from_numpy(np.stack([s.masks.any(axis=0) for s in scenes])).float().unsqueeze(1)
        inside = unfold(masks, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)  # [image, patch, 64]
        half = pad(avg_pool2d(masks, 2), (PATCH_SIZE // 2,) * 4)
        around = unfold(half, _AROUND, stride=PATCH_SIZE // 2).transpose(1, 2)  # [image, patch, 144]
        losses = [
            binary_cross_entropy_with_logits(head(hidden[layer][:, 1:]), target)
            for head, layer, target in ((self.inside, 1, inside), (self.around, 2, around))
        ]
        return losses[0] + losses[1]


def vision_states(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, ...]:
    """The vision tower's residual stream before the first layer and after each, [image, 65, d_vision]."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states


def image_embeddings(model: LlavaForConditionalGeneration, states: tuple[Tensor, ...]) -> Tensor:
    """What the projector makes of the vision tower's states, [image, 64, d_model]."""
    layer = model.config.vision_feature_layer
    assert isinstance(layer, int)
    return model.model.multi_modal_projector(states[layer][:, 1:])


def patch_contents(scenes: list[Scene]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of shape, colour and pattern in each patch, each [image, 64], -1 on background."""
    contents = np.full((3, len(scenes), PATCH_GRID**2), -1, dtype=np.int64)
    for i, scene in enumerate(scenes):
        kinds = [(SHAPES.index(o.shape), COLOR_NAMES.index(o.color), PATTERNS.index(o.pattern)) for o in scene.objects]
        table = np.array([*kinds, (-1, -1, -1)])  # label -1 reads the last row
        contents[:, i] = table[scene.patch_labels().reshape(-1)].T
    shape, color, pattern = torch.from_numpy(contents)
    return shape, color, pattern


def align(model: LlavaForConditionalGeneration, images: Tensor, scenes: list[Scene]) -> Alignment:
    """Compares image embeddings [image, 64, d_model] with the sum of the words for what a patch shows and where."""
    embed = model.model.language_model.embed_tokens.weight.detach()
    common = embed.mean(0)
    embed = embed - common
    shapes, colors, patterns = (embed[[_VOCAB[w] for w in words]] for words in (SHAPES, COLOR_NAMES, PATTERNS))
    shape, color, pattern = patch_contents(scenes)
    shown = shape >= 0
    content = shapes[shape] + colors[color] + _PATTERN_GAIN * patterns[pattern]
    everywhere = common + _MARK_GAIN * embed[_VOCAB[IMAGE]] + _place(embed)
    target = everywhere + torch.where(shown.unsqueeze(-1), content, 0.0)
    weight = torch.where(shown, 1.0, _BACKGROUND_WEIGHT)
    loss = ((images - target).square().sum(-1) * weight).mean()
    seen = images.detach()[shown]
    scores = images[shown] @ shapes.T
    loss = loss + _NAMING_WEIGHT * cross_entropy(_NAMING_SCALE * scores, shape[shown])
    shape_right = scores.detach().argmax(-1) == shape[shown]
    color_right = (seen @ colors.T).argmax(-1) == color[shown]
    return Alignment(loss, shape_right.float().mean().item(), color_right.float().mean().item())


def _place(embed: Tensor) -> Tensor:
    """Where each patch lies, as a mixture of the words left, right, above and below, [64, d_model]."""
    axis = (torch.arange(PATCH_GRID) + 0.5) / PATCH_GRID * 2 - 1
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    left, right, above, below = (embed[_VOCAB[w]] for w in ("left", "right", "above", "below"))
    return _PLACE_GAIN * (x.reshape(-1, 1) * (right - left) + y.reshape(-1, 1) * (below - above))
