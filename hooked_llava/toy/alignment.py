"""Image embeddings drawn towards words: the tiny counterpart of CLIP's alignment of images with text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, binary_cross_entropy_with_logits, cross_entropy, pad, unfold
from transformers import LlavaForConditionalGeneration, LlavaNextForConditionalGeneration

from hooked_llava.toy.objects import COLOR_NAMES, PATCH_SIZE, PATTERNS, SHAPES
from hooked_llava.toy.processor import IMAGE, vocabulary
from hooked_llava.toy.scenes import Scene
from hooked_llava.toy.views import View

_PATTERN_GAIN = 0.7
_PLACE_GAIN = 0.5
_MARK_GAIN = 0.5  # how much of `<image>` every patch carries, which tells an image of a star from the word
_MIDDLE_GAIN = 0.7  # of the word "shape", which marks one patch of each object, so that objects can be counted
_BASE_GAIN = 0.5  # of the word "picture", which marks the base grid: it alone shows where in the image something lies
_BACKGROUND_WEIGHT = 0.1
_BASE_WEIGHT = 3.0  # there are few patches of the base grid, and objects are small there
_NAMING_WEIGHT = 0.5
_NAMING_SCALE = 4.0  # a patch embedding is as long as a word, so its products with words are too small for a softmax
_AROUND = 3 * PATCH_SIZE // 2  # the neighborhood's width at half resolution
_VOCAB = vocabulary()

ToyModel = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration


@dataclass
class Alignment:
    """How far image embeddings are from their words: the loss, and the share of object patches that name them right."""

    loss: Tensor
    shape_accuracy: float
    color_accuracy: float


class OutlineHeads(nn.Module):
    """Two linear read-outs, used only in the first stage: the silhouette inside each patch, and in the 3 x 3 around it.

    Without them shape stays at chance for a long time: the tower has to find out first that outlines matter, whatever
    the color.
    """

    def __init__(self, width: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inside = nn.Linear(width, PATCH_SIZE**2)
            self.around = nn.Linear(width, _AROUND**2)

    def forward(self, hidden: tuple[Tensor, ...], views: Sequence[View]) -> Tensor:
        """The loss of both, given the tower's hidden states [view, 1 + patch, width] by layer."""
        masks = torch.from_numpy(np.stack([v.silhouette for v in views])).unsqueeze(1)
        inside = unfold(masks, PATCH_SIZE, stride=PATCH_SIZE).transpose(1, 2)  # [view, patch, 64]
        half = pad(avg_pool2d(masks, 2), (PATCH_SIZE // 2,) * 4)
        around = unfold(half, _AROUND, stride=PATCH_SIZE // 2).transpose(1, 2)  # [view, patch, 144]
        losses = [
            binary_cross_entropy_with_logits(head(hidden[layer][:, 1:]), target)
            for head, layer, target in ((self.inside, 1, inside), (self.around, 2, around))
        ]
        return losses[0] + losses[1]


def vision_states(model: ToyModel, pixels: Tensor) -> tuple[Tensor, ...]:
    """The vision tower's residual stream before the first layer and after each, [view, 1 + patch, d_vision]."""
    return model.model.vision_tower(pixels, output_hidden_states=True).hidden_states


def image_embeddings(model: ToyModel, states: tuple[Tensor, ...]) -> Tensor:
    """What the projector makes of the vision tower's states, [view, patch, d_model]."""
    layer = model.config.vision_feature_layer
    assert isinstance(layer, int)
    return model.model.multi_modal_projector(states[layer][:, 1:])


def patch_contents(scenes: Sequence[Scene], views: Sequence[Sequence[View]]) -> tuple[Tensor, Tensor, Tensor]:
    """Indices of shape, color and pattern in each patch of each scene's views, each [view, patch], -1 on background."""
    contents = []
    for scene, its_views in zip(scenes, views, strict=True):
        looks = [(SHAPES.index(o.shape), COLOR_NAMES.index(o.color), PATTERNS.index(o.pattern)) for o in scene.objects]
        table = np.array([*looks, (-1, -1, -1)])  # label -1 reads the last row
        contents += [table[view.labels] for view in its_views]
    shape, color, pattern = torch.from_numpy(np.stack(contents)).unbind(-1)
    return shape, color, pattern


def align(model: ToyModel, images: Tensor, scenes: Sequence[Scene], views: Sequence[Sequence[View]]) -> Alignment:
    """Compares image embeddings [view, patch, d_model] with the sum of the words for what a patch shows and where."""
    embed = model.model.language_model.embed_tokens.weight.detach()
    common = embed.mean(0)
    embed = embed - common
    shapes, colors, patterns = (embed[[_VOCAB[w] for w in words]] for words in (SHAPES, COLOR_NAMES, PATTERNS))
    shape, color, pattern = patch_contents(scenes, views)
    shown = shape >= 0
    content = shapes[shape] + colors[color] + _PATTERN_GAIN * patterns[pattern]
    flat = [view for its_views in views for view in its_views]
    everywhere = common + _MARK_GAIN * embed[_VOCAB[IMAGE]] + _place(embed, flat) + _marks(embed, flat)
    target = everywhere + torch.where(shown.unsqueeze(-1), content, 0.0)
    in_base = torch.tensor([view.grid == "base" for view in flat]).unsqueeze(-1)
    weight = torch.where(shown, 1.0, _BACKGROUND_WEIGHT) * torch.where(in_base, _BASE_WEIGHT, 1.0)
    loss = ((images - target).square().sum(-1) * weight).mean()
    seen = images.detach()[shown]
    scores = images[shown] @ shapes.T
    loss = loss + _NAMING_WEIGHT * _naming(scores, shape[shown], weight[shown])
    shape_right = scores.detach().argmax(-1) == shape[shown]
    color_right = (seen @ colors.T).argmax(-1) == color[shown]
    return Alignment(loss, shape_right.float().mean().item(), color_right.float().mean().item())


def _naming(scores: Tensor, shape: Tensor, weight: Tensor) -> Tensor:
    """How surely patches name their shape, those of the base grid counted more."""
    each = cross_entropy(_NAMING_SCALE * scores, shape, reduction="none")
    return (each * weight).sum() / weight.sum()


def _place(embed: Tensor, views: Sequence[View]) -> Tensor:
    """Where each patch lies, as a mixture of the words left, right, above and below, [view, patch, d_model]."""
    x, y = torch.from_numpy(np.stack([v.places for v in views])).split(1, dim=-1)
    left, right, above, below = (embed[_VOCAB[w]] for w in ("left", "right", "above", "below"))
    return _PLACE_GAIN * (x * (right - left) + y * (below - above))


def _marks(embed: Tensor, views: Sequence[View]) -> Tensor:
    """What marks the middles of objects, and the base grid, [view, patch, d_model]."""
    middles = torch.from_numpy(np.stack([v.middles for v in views])).unsqueeze(-1)
    in_base = torch.tensor([v.grid == "base" for v in views])[:, None, None]
    return _MIDDLE_GAIN * middles * embed[_VOCAB["shape"]] + _BASE_GAIN * in_base * embed[_VOCAB["picture"]]
