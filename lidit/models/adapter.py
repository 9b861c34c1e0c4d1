"""The LLMDiff-Adapter in a U-Net: each cross-attention reads phi(c), and a new one beside it reads c itself.

    f = attention(q, phi(c)) a1 e^b1  +  new attention(q, c) a2 e^b2        (Dong et al., ACM MM 2024)

Here c is an LLM's encoding of the text, and phi a linear layer to the width that the U-Net reads. The U-Net is
diffusers' own and frozen. The adapter enters it through its attention processors, so none of its code is copied here.
Phi, the new projections and the gains a and b are trained and saved.
"""

from __future__ import annotations

import json
import logging
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers.models import UNet2DConditionModel
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from lidit.models.contracts import Text
from lidit.models.source import find_file, load_name
from lidit.models.unet import smallest_patch, step_of

log = logging.getLogger(__name__)


class AdaptedAttention(nn.Module):
    """The attention processor of one cross-attention of the U-Net; it reads phi(c) and c, concatenated by channels.

    Args:
        query_width: channels of the image's tokens.
        inner: heads times the width of a head.
        text: width e of c.
        second: add the new attention; without it, phi alone adapts the U-Net.
    """

    def __init__(self, query_width: int, inner: int, text: int, second: bool):
        super().__init__()
        self.text = text
        # UNSTATED: the gains' initial values; with ours the U-Net starts as it was, but reading phi(c).
        self.a1, self.b1 = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))
        self.second = second
        if second:
            self.a2, self.b2 = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))
            self.query = nn.Linear(query_width, inner, bias=False)
            self.key, self.value = nn.Linear(text, inner, bias=False), nn.Linear(text, inner, bias=False)

    def hidden_matrices(self) -> dict[nn.Parameter, int]:
        """The second attention's matrices, for Muon."""
        return dict.fromkeys((each.weight for each in (self.query, self.key, self.value)), 1) if self.second else {}

    def forward(
        self,
        attn: Any,
        hidden_states: Float[Tensor, "b n d"],
        encoder_hidden_states: Float[Tensor, "b l _"],
        attention_mask: Tensor | None = None,
        **ignored: object,  # temb, which an attention without a spatial norm does not read
    ) -> Float[Tensor, "b n d"]:
        """Called by diffusers, with the U-Net's attention, the query tokens, the text, and a bias over the text."""
        phi, c = encoder_hidden_states.split([encoder_hidden_states.shape[2] - self.text, self.text], -1)
        if attention_mask is not None:
            b, length = phi.shape[:2]
            attention_mask = attn.prepare_attention_mask(attention_mask, length, b)
            attention_mask = attention_mask.view(b, attn.heads, -1, attention_mask.shape[-1])
        keys, values = attn.to_k(phi), attn.to_v(phi)
        read = _attend(attn, attn.to_q(hidden_states), keys, values, attention_mask) * self.a1 * self.b1.exp()
        if self.second:
            keys, values = self.key(c), self.value(c)
            new = _attend(attn, self.query(hidden_states), keys, values, attention_mask)
            read = read + new * self.a2 * self.b2.exp()
        read = attn.to_out[1](attn.to_out[0](read.to(hidden_states.dtype)))
        read = read + hidden_states if attn.residual_connection else read
        return read / attn.rescale_output_factor


def _attend(attn: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Float[Tensor, "b n d"]:
    """Scaled dot-product attention with the heads of the U-Net's own."""
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


class AdaptedUNet(nn.Module):
    """A frozen `UNet2DConditionModel` with the adapter, as a backbone of `TextToImage`, predicting noise.

    Args:
        channels: latent channels; must be the U-Net's.
        name: Hugging Face id, folder, or `bundled:NAME` of the U-Net or its pipeline.
        text_width: width e of the encoding c, which is the LLM's.
        second: give each cross-attention a second one that reads c.
        subfolder: the U-Net's folder inside `name`: `unet` in whole pipelines; empty for a U-Net by itself.
        revision: branch, tag or commit on the Hugging Face hub.
        dtype: precision of the U-Net's weights and computation.

    Raises:
        ValueError: `name` holds no U-Net with cross-attention, or a U-Net for latents of other channels.
    """

    def __init__(
        self,
        channels: int,
        name: str,
        text_width: int,
        second: bool = True,
        subfolder: str = "unet",
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    ):
        super().__init__()
        self.name, self.subfolder, self.revision, self.dtype = name, subfolder, revision, dtype
        self.text_width, self._unet = text_width, None
        if self.config["in_channels"] != channels:
            raise ValueError(
                f"{name} denoises latents of {self.config['in_channels']} channels, and the VAE has {channels}; "
                "use the VAE it was trained with"
            )
        with torch.device("meta"):
            found = cross_attentions(UNet2DConditionModel.from_config(self.config))
        self.phi = nn.Linear(text_width, self.width)
        self.adapters = nn.ModuleDict(
            {
                key: AdaptedAttention(attn.to_q.in_features, attn.to_q.out_features, text_width, second)
                for key, attn in found.items()
            }
        )
        # SDXL also reads a vector of the whole text, made here from the mean of c, and the image's size and crop
        pooled = self.config.get("addition_embed_type") == "text_time"
        self.pool = nn.Linear(text_width, pooled_width(self.config)) if pooled else None
        self.blocks = nn.ModuleList()  # none that `parallel.py` can checkpoint or shard

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of the U-Net's config.json.

        Raises:
            ValueError: the config describes something else, or a U-Net without cross-attention.
        """
        wanted = f"{self.subfolder}/config.json" if self.subfolder else "config.json"
        config = json.loads(Path(find_file(self.name, wanted, self.revision)).read_text())
        if config.get("_class_name") != "UNet2DConditionModel":
            raise ValueError(
                f"{self.name} holds {config.get('_class_name')!r}, not a diffusers UNet2DConditionModel; give its "
                "subfolder, such as unet"
            )
        if not any("CrossAttn" in kind for kind in config["down_block_types"]):
            raise ValueError(
                f"{self.name} has no cross-attention, which the adapter works through; choose another U-Net"
            )
        return config

    @property
    def width(self) -> int:
        """Channels that the U-Net's own cross-attentions read."""
        return self.config["cross_attention_dim"]

    @property
    def patch(self) -> int:
        """The sides of a latent must be multiples of it."""
        return smallest_patch(self.config["block_out_channels"])

    def load(self, device: torch.device) -> Any:  # the U-Net; type checkers misread its decorated methods
        """Put the U-Net on a device; the first call reads it and puts the adapter into it."""
        if self._unet is None:
            unet = UNet2DConditionModel.from_pretrained(
                load_name(self.name),
                subfolder=self.subfolder or None,
                revision=self.revision,
                torch_dtype=getattr(torch, self.dtype),
            )
            self._hold(unet)
            trained, frozen = (sum(p.numel() for p in module.parameters()) for module in (self, unet))
            log.info(
                "%s: %.2fM parameters of the adapter are trained, %.2fM frozen", self.name, trained / 1e6, frozen / 1e6
            )
        return self._unet if self._unet.device == device else self._unet.to(device)

    def hold_unread(self) -> None:
        """Hold a U-Net of the config's sizes with new weights, none of which is read: enough to count by."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(getattr(torch, self.dtype))
        try:
            self._hold(UNet2DConditionModel.from_config(self.config))
        finally:
            torch.set_default_dtype(default)

    def _hold(self, unet: Any) -> None:
        """Put the adapter into a U-Net, and hold it frozen."""
        unet.eval().requires_grad_(False)
        for key, attn in cross_attentions(unet).items():
            # bypasses nn.Module's registration: the U-Net's parameters are frozen, the processor's are trained here
            attn.__dict__["processor"] = self.adapters[key]
            attn._modules.pop("processor", None)
        self.__dict__["_unet"] = unet  # outside the module tree: no checkpoint or EMA copy holds it

    def forward(self, x: Float[Tensor, "b c h w"], t: Float[Tensor, " b"], text: Text) -> Float[Tensor, "b c h w"]:
        """Predict the noise in x at time t = (k + 1) / 1000, which is step k of the schedule.

        Args:
            x: noisy latent.
            t: times in (0, 1].
            text: c as tokens (b l e), their mask, and their mean (b e).

        Raises:
            ValueError: the text and the adapter have different widths.
        """
        if text.tokens.shape[2] != self.text_width:
            raise ValueError(
                f"the text has {text.tokens.shape[2]} channels, and the adapter is for {self.text_width}; set "
                "backbone.text_width to the LLM's width, and project=false of LLMDiffEncoder"
            )
        unet = self.load(x.device)
        both = torch.cat([self.phi(text.tokens), text.tokens.to(self.phi.weight.dtype)], -1)
        added = {"added_cond_kwargs": self._added(x, text)} if self.pool is not None else {}
        mask = text.mask.to(x.dtype)
        return unet(x.to(unet.dtype), step_of(t), both.to(unet.dtype), encoder_attention_mask=mask, **added).sample

    def _added(self, x: Tensor, text: Text) -> dict[str, Tensor]:
        height, width = (8 * side for side in x.shape[2:])
        size = x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)  # original, crop, target
        return {"text_embeds": self.pool(text.pooled), "time_ids": size}


def cross_attentions(unet: Any) -> dict[str, Any]:
    """The U-Net's cross-attentions by name, with `-` for the `.` that a ModuleDict forbids in keys.

    Raises:
        ValueError: one has a norm of its own.
    """
    found = {
        name.replace(".", "-"): module
        for name, module in unet.named_modules()
        if getattr(module, "is_cross_attention", False)
    }
    for name, attn in found.items():
        odd = ("spatial_norm", "group_norm", "norm_cross", "norm_q", "norm_k")
        if extra := [part for part in odd if getattr(attn, part, None)]:
            raise ValueError(f"cross-attention {name} has a {extra[0]}, which the adapter does not know")
    return found


def pooled_width(config: dict[str, Any]) -> int:
    """Channels of the vector of the whole text that an SDXL-like U-Net reads."""
    return config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
