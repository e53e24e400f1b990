"""The projector: vision features -> image embeddings in the language model's residual stream."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from hooked_llava.architecture.sizes import ProjectorConfig
from hooked_llava.model.components.hook_point import HookPoint
from hooked_llava.model.components.mlp import activation
from hooked_llava.model.components.quantized import like_weight


class Projector(nn.Module):
    """Two linear maps with an activation between."""

    def __init__(self, cfg: ProjectorConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.linear_in = nn.Linear(cfg.d_in, cfg.d_model, bias=cfg.bias)
        self.linear_out = nn.Linear(cfg.d_model, cfg.d_model, bias=cfg.bias)
        self.act = activation(cfg.act_fn)
        self.hook_pre = HookPoint()
        self.hook_post = HookPoint()
        self.hook_out = HookPoint()

    def forward(self, features: Float[Tensor, "tile feature d_features"]) -> Float[Tensor, "tile feature d_model"]:
        """Image embeddings, one for each feature vector; in the dtype and on the device of the projector."""
        features = features.to(like_weight(self.linear_in))
        hidden = self.hook_post(self.act(self.hook_pre(self.linear_in(features))))  # (tile, feature, d_model)
        return self.hook_out(self.linear_out(hidden))
