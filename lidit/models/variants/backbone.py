"""The LI-DiT backbone with other systems' ways of reading the text."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from lidit.models.contracts import Text
from lidit.models.lidit import LIDiT


class VariantLIDiT(LIDiT):
    """A `LIDiT` whose blocks may read different levels of an LLM, or text at a smaller scale.

    Args:
        channels: latent channels.
        levels: number k of the LLM's hidden states, which the text holds concatenated (b l k*d); block i reads level
            i k / depth (Playground v3).
        text_scale: initial weight of the RMSNorm over text tokens; 0.01 in SANA.
        settings: other arguments of `LIDiT`.
    """

    def __init__(self, channels: int, levels: int = 1, text_scale: float = 1.0, **settings: Any):
        super().__init__(channels, **settings)
        self.levels = levels
        nn.init.constant_(self.text_norm.weight, text_scale)

    def read(self, text: Text) -> list[Float[Tensor, "b l d"]]:
        """The tokens of each block's own level, normalised.

        Raises:
            ValueError: the text has another number of levels.
        """
        if text.tokens.shape[2] != self.levels * self.width:
            raise ValueError(
                f"the text has {text.tokens.shape[2]} channels, not {self.levels} levels of {self.width}; use the same "
                "`levels` for prompt_encoder and backbone"
            )
        levels = self.text_norm(text.tokens.unflatten(-1, (self.levels, -1))).unbind(2)
        return [levels[i * self.levels // len(self.blocks)] for i in range(len(self.blocks))]
