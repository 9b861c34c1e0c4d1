"""The LI-DiT backbone: a diffusion transformer that reads text by cross-attention (LI-DiT, section 3.3, Table 7).

There is no position embedding: one convolutional block after patchify tells each patch where it is, so that the same
weights work at any resolution and aspect ratio.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor, nn

from lidit.models.contracts import KeysValues, Text
from lidit.models.layers import Attention, Mlp, PreciseLinear, TimestepEmbedding, layer_norm, modulate


class ConvPosition(nn.Module):
    """The convolutional ResBlock after patchify; zero padding at the borders is its only source of position.

    UNSTATED: we take GroupNorm, SiLU and two 3x3 convolutions, the usual ResBlock of diffusion models.
    """

    def __init__(self, width: int):
        super().__init__()
        self.block = nn.Sequential(
            nn.GroupNorm(32, width, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
            nn.GroupNorm(32, width, eps=1e-6),
            nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )

    def forward(self, x: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        return x + self.block(x)


class LIDiTBlock(nn.Module):
    """Self-attention, cross-attention to the text, MLP; each with shift, scale and gate: nine modulation vectors."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool):
        super().__init__()
        self.self_norm, self.cross_norm, self.mlp_norm = layer_norm(width), layer_norm(width), layer_norm(width)
        self.self_attention = Attention(width, heads, qk_norm)
        self.cross_attention = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width, mlp_ratio)
        self.modulation = nn.Sequential(nn.SiLU(), PreciseLinear(width, 9 * width))

    def forward(
        self,
        x: Float[Tensor, "b n d"],
        text: Float[Tensor, "b l d"],
        visible: Bool[Tensor, "b 1 1 l"],
        condition: Float[Tensor, "b d"],
        keys_values: tuple[Tensor, Tensor] | None = None,
    ) -> Float[Tensor, "b n d"]:
        vectors = self.modulation(condition).chunk(9, 1)
        shift_s, scale_s, gate_s, shift_c, scale_c, gate_c, shift_m, scale_m, gate_m = vectors
        x = x + gate_s[:, None] * self.self_attention(modulate(self.self_norm(x), shift_s, scale_s))
        queries = modulate(self.cross_norm(x), shift_c, scale_c)
        x = x + gate_c[:, None] * self.cross_attention(queries, text, visible, keys_values)
        return x + gate_m[:, None] * self.mlp(modulate(self.mlp_norm(x), shift_m, scale_m))

    def keys_values(self, text: Float[Tensor, "b l d"]) -> tuple[Tensor, Tensor]:
        """The cross-attention's keys and values of a text, each (b heads l d/heads)."""
        return self.cross_attention.keys_values(text)


class LIDiT(nn.Module):
    """LI-DiT: predicts velocity or noise of a latent from time and text.

    Args:
        channels: latent channels.
        depth: blocks (1B: 28, 10B: 48).
        width: hidden size (1B: 1152, 10B: 2816).
        heads: attention heads (1B: 16, 10B: 44).
        patch: side of a patch in latent pixels.
        mlp_ratio: hidden width of the MLP over the width.
        qk_norm: RMSNorm on queries and keys in both attentions.

    Raises:
        ValueError: the width is not divisible by `heads`, or not by 32.
    """

    def __init__(
        self,
        channels: int,
        depth: int = 28,
        width: int = 1152,
        heads: int = 16,
        patch: int = 2,
        mlp_ratio: float = 4.0,
        qk_norm: bool = True,
    ):
        super().__init__()
        if width % 32:
            raise ValueError(f"width {width} is not a multiple of 32, which the convolution's GroupNorm needs")
        self.width, self.patch = width, patch
        self.patchify = nn.Conv2d(channels, width, patch, stride=patch)
        self.position = ConvPosition(width)
        self.time = TimestepEmbedding(width)
        # UNSTATED: the paper names no norm on the text that the blocks read; we take an RMSNorm, as SANA does.
        self.text_norm = nn.RMSNorm(width, eps=1e-6)
        self.blocks = nn.ModuleList(LIDiTBlock(width, heads, mlp_ratio, qk_norm) for _ in range(depth))
        self.final_norm = layer_norm(width)
        self.final_modulation = nn.Sequential(nn.SiLU(), PreciseLinear(width, 2 * width))
        self.final = nn.Linear(width, patch * patch * channels)
        self._initialise()

    def _initialise(self) -> None:
        """Xavier weights, and zero where DiT has zero: every modulation and the output.

        UNSTATED: the paper only starts the refiners' gates at zero; the rest of the initialisation is DiT's.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in (*(block.modulation[1] for block in self.blocks), self.final_modulation[1], self.final):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Float[Tensor, " b"],
        text: Text,
        keys_values: KeysValues | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Predict from the noisy latent x at time t in [0, 1].

        Args:
            x: noisy latent.
            t: times.
            text: the prompt encoder's text, which the blocks read.
            keys_values: the text's keys and values from `keys_values`, for a text that is read at many times.

        Raises:
            ValueError: a side of the latent is not a multiple of the patch.
        """
        height, width = x.shape[2:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"a latent of {width}x{height} does not divide into patches of {self.patch}x{self.patch}")
        condition, visible = self.time(t) + text.pooled, text.mask[:, None, None]
        x = self.position(self.patchify(x).to(condition.dtype))  # the residual stream is float32, as the condition
        rows = x.shape[2]
        x = x.flatten(2).transpose(1, 2).contiguous()  # b n d; a view here would be compiled once more
        of_blocks = keys_values or [None] * len(self.blocks)
        for block, tokens, pair in zip(self.blocks, self.read(text), of_blocks, strict=True):
            x = block(x, tokens, visible, condition, pair)
        shift, scale = self.final_modulation(condition).chunk(2, 1)
        x = self.final(modulate(self.final_norm(x), shift, scale))
        x = x.unflatten(1, (rows, -1)).unflatten(-1, (self.patch, self.patch, -1))  # b h/p w/p p p c
        return x.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)

    def read(self, text: Text) -> list[Float[Tensor, "b l d"]]:
        """The text tokens that each block reads: normalised, and the same for all blocks."""
        return [self.text_norm(text.tokens)] * len(self.blocks)

    def keys_values(self, text: Text) -> KeysValues:
        """The text's keys and values for every block, computed once for many calls, as in sampling."""
        return [block.keys_values(tokens) for block, tokens in zip(self.blocks, self.read(text), strict=True)]
