"""A CLIP's text tower in the place of the frozen LLM, as in Stable Diffusion: what the LLMDiff-Adapter starts from.

Every prompt is padded to the tower's whole length, and the denoiser sees all of it, padding and start token included.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedConfig

from lidit.models.chat import Split
from lidit.models.llm import FrozenLLM

KINDS = ("clip", "clip_text_model")  # model types


class FrozenCLIPText(FrozenLLM):
    """The text tower of a CLIP in transformers' format, frozen; it is used like a `FrozenLLM`.

    Features are the last hidden state after the final norm, as Stable Diffusion 1 reads openai/clip-vit-large-patch14.

    Args:
        name: the CLIP's Hugging Face id, folder, or `bundled:NAME`.
        max_tokens: largest number of caption tokens; with the start and end tokens it must fill the tower's length.
        dtype: precision of the weights, of the computation and of the features.
        revision: branch, tag or commit on the Hugging Face hub.
    """

    AUTO = CLIPTextModel

    def __init__(
        self,
        name: str,
        max_tokens: int = 75,
        dtype: Literal["bfloat16", "float32"] = "float32",
        revision: str | None = None,
    ) -> None:
        super().__init__(name, -1, "", None, max_tokens, "right", dtype, revision, "plain")

    def _check_kind(self, config: PreTrainedConfig) -> None:
        if config.model_type not in KINDS:
            raise ValueError(f"{self.name} is of type {config.model_type}, not a CLIP; name a CLIP, or use FrozenLLM")
        longest = config.get_text_config().max_position_embeddings - 2
        if self.prompts.max_tokens != longest:
            raise ValueError(f"{self.name} reads {longest} tokens between start and end; set max_tokens to {longest}")

    def _untrained(self, dtype: torch.dtype) -> CLIPTextModel:
        """The tower of the config, with new weights; only transformers' Auto classes have `from_config`."""
        return CLIPTextModel(self._needed()).to(dtype)

    def _shared(self, splits: list[Split]) -> int:
        """Zero: every prompt is padded to the same length, so nothing would be saved."""
        return 0

    def _pad(self, splits: list[Split]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids and an all-true mask (b l) at the tower's length; every token counts as the caption's."""
        shape = len(splits), self.prompts.max_tokens + 2
        batch = torch.full(shape, self.prompts.tokenizer.pad_token_id)
        for row, (ids, _, _) in zip(batch, splits, strict=True):
            row[: len(ids)] = torch.tensor(ids)
        return batch, torch.ones(shape, dtype=torch.bool), torch.zeros(len(splits), dtype=torch.long)

    def _states(
        self, model: Any, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"], shared: int
    ) -> Float[Tensor, "b l e"]:
        return model(input_ids=ids).last_hidden_state
