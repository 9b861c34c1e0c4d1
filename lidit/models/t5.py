"""The encoder of a T5 in the place of the frozen LLM: LI-DiT compares LLMs with it (Table 3, Figures 2, 3).

An encoder reads the whole prompt in both directions. It was trained to fill in missing spans, and knows no chat.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AutoModelForTextEncoding, PreTrainedConfig

from lidit.models.chat import Split
from lidit.models.llm import FrozenLLM

KINDS = ("t5", "mt5", "umt5")  # model types; Flan-T5 and UL2 are t5


class FrozenT5(FrozenLLM):
    """The encoder of a T5, mT5, UMT5, Flan-T5 or UL2, frozen; it is used like a `FrozenLLM`.

    Instruction and caption are plain text closed by the end-of-text token; without an instruction the caption starts at
    token 0. Only the encoder is read.

    Args:
        name: the T5's Hugging Face id, folder, or `bundled:NAME`.
        layer: number of the encoder's hidden state that becomes the features: 0 is the embeddings, -1 the last block's
            after the final norm, which is how T5 is always used.
        instruction: sentence before the caption; by default none.
        max_tokens: largest number of caption tokens; a longer caption is cut.
        padding_side: side on which the shorter prompts of a batch are padded; the features do not depend on it.
        dtype: precision of the weights, of the computation and of the features; T5 overflows in float16.
        revision: branch, tag or commit on the Hugging Face hub.
    """

    AUTO = AutoModelForTextEncoding

    def __init__(
        self,
        name: str,
        layer: int = -1,
        instruction: str = "",
        max_tokens: int = 256,
        padding_side: Literal["right", "left"] = "right",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        revision: str | None = None,
    ) -> None:
        super().__init__(name, layer, instruction, None, max_tokens, padding_side, dtype, revision, "plain")

    def _check_kind(self, config: PreTrainedConfig) -> None:
        if config.model_type not in KINDS:
            raise ValueError(
                f"{self.name} is of type {config.model_type}, not {', '.join(KINDS)}; name a T5, or read a "
                "decoder-only LLM with class_path: lidit.models.llm.FrozenLLM"
            )

    def _needed(self) -> PreTrainedConfig:
        return type(self._config).from_dict(self._config.to_dict() | {"num_layers": self.depth})

    def _stack(self, model: Any) -> Any:
        return model.encoder

    def _shared(self, splits: list[Split]) -> int:
        """Zero: without a causal mask the first tokens see the rest of the prompt."""
        return 0

    @staticmethod
    def _states(model: Any, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"], shared: int) -> Float[Tensor, "b l e"]:
        """Hidden states; positions are relative, so padding does not move them."""
        return model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
