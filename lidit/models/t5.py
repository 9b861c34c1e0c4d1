"""A frozen encoder of the T5 type as prompt encoder: what LI-DiT compares LLMs with (Figure 2, Table 3)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForTextEncoding, PreTrainedConfig, PreTrainedModel

from lidit.models.chat import Split
from lidit.models.llm import FrozenLLM


class FrozenT5(FrozenLLM):
    """The encoder of a T5, mT5, UMT5 or other encoder-decoder that transformers knows as a text encoder.

    It has seen every word from every other one, so there is no causal mask to undo. Features are those after the last
    block and the final norm; what is kept of a prompt is the caption and the token that ends the text.

    Args:
        name: Hugging Face id, folder, or `bundled:NAME`.
        instruction: sentence before the caption; T5 is not made to follow one, so there is none.
        max_tokens: as of FrozenLLM.
        padding_side: as of FrozenLLM.
        dtype: as of FrozenLLM, without int8.
        revision: as of FrozenLLM.
    """

    def __init__(
        self,
        name: str,
        instruction: str = "",
        max_tokens: int = 256,
        padding_side: Literal["right", "left"] = "right",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        revision: str | None = None,
    ) -> None:
        read = {"max_tokens": max_tokens, "padding_side": padding_side, "dtype": dtype, "revision": revision}
        super().__init__(name, layer=-1, instruction=instruction, template="plain", **read)

    def _check(self, config: PreTrainedConfig) -> None:
        if not config.is_encoder_decoder or type(config) not in AutoModelForTextEncoding._model_mapping:
            raise ValueError(f"{self.name} is no T5 ({config.model_type}); read a decoder-only LLM by FrozenLLM")

    def read(self, device: str | torch.device = "cpu") -> PreTrainedModel:
        """The encoder alone: no decoder is built or read."""
        return self._load(AutoModelForTextEncoding, device).eval().requires_grad_(False)

    def skeleton(self) -> PreTrainedModel:
        """What `read` gives, on the meta device: shapes without memory."""
        with torch.device("meta"):
            return AutoModelForTextEncoding.from_config(self._config, dtype=getattr(torch, self.dtype))

    def _shared(self, splits: list[Split]) -> int:
        return 0  # every token sees the whole prompt

    def _states(
        self, model: Any, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"], shared: int
    ) -> Float[Tensor, "b l e"]:
        return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
