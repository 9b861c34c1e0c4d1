"""A U-Net of diffusers as a backbone that is trained: the latent diffusion model that an LLMDiff-Adapter adapts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusers.models import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn

from lidit.models.contracts import Text

STEPS = 1000  # steps of the noise schedule that U-Nets of diffusers are trained with


def step_of(t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
    """The step k of the noise schedule at times t = (k + 1) / 1000 in (0, 1]."""
    return (t * STEPS - 1).round().clamp(0, STEPS - 1)


def smallest_patch(channels: Sequence[int]) -> int:
    """What a latent's sides must be multiples of: each level of a U-Net but the last halves them."""
    return 2 ** (len(channels) - 1)


class UNet(nn.Module):
    """A `UNet2DConditionModel` with new weights, predicting noise; its cross-attentions read the text unchanged.

    Args:
        channels: latent channels.
        settings: other arguments of diffusers' class; `cross_attention_dim` is the text's width.

    Raises:
        TypeError: a setting is not an argument of diffusers' class.
    """

    def __init__(self, channels: int, settings: dict[str, Any]):
        super().__init__()
        self.unet = UNet2DConditionModel(in_channels=channels, out_channels=channels, **settings)
        self.width = self.unet.config.cross_attention_dim
        self.patch = smallest_patch(self.unet.config.block_out_channels)
        self.blocks = nn.ModuleList()  # none that `parallel.py` can checkpoint or shard

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], text: Text) -> Float[Tensor, "b c h w"]:
        """Predict the noise in x at time t in (0, 1].

        Raises:
            ValueError: the text and the cross-attentions have different widths.
        """
        if text.tokens.shape[2] != self.width:
            raise ValueError(
                f"the text has {text.tokens.shape[2]} channels and the U-Net reads {self.width}; set "
                "backbone.settings.cross_attention_dim to the text's width"
            )
        return self.unet(x, step_of(t), text.tokens, encoder_attention_mask=text.mask.to(x.dtype)).sample
