"""The frozen LLM: prompts, each after an instruction, to hidden states of an inner block (paper sections 3.1 and 3.2).

The instruction asks the LLM to describe a picture, so that its states dwell on attributes rather than on the next word.
Where the caption starts is found from the tokenizer, by character offsets in the rendered chat: no constant is counted by
hand, and any model with a chat template serves.
"""

from __future__ import annotations

import hashlib
import warnings
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from jinja2 import TemplateError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from lidit.models.source import find_config, find_revision, load_name

INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "and spatial relationships of the objects:"
)
MARK = "lidit puts the caption here"  # stands for the user's turn when the template around it is read
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")  # Llama to Gemma; GPT-2, Falcon; Phi; GPT-NeoX
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")  # one entry a block
TOWER = {r"^(model\.)?language_model\.(model\.)?": ""}  # where LLaVA-type checkpoints keep the language tower, old and new


class FrozenLLM:
    """A decoder-only LLM, or the language tower of a LLaVA-type model, outside the module tree.

    What is kept of an encoded prompt is the caption's tokens and the one token that closes the user's turn, so that an
    empty caption still leaves one. `cut` counts the captions that were longer than `max_tokens` so far.

    Args:
        name: Hugging Face id, folder, or `bundled:NAME`.
        layer: which of the hidden states, as transformers numbers them: 0 the embeddings, -1 after the last block and the
            final norm, -3 the third-to-last block (the paper's).
        instruction: sentence before the caption in the user's turn; empty: the caption alone.
        system: system prompt; none: what the template puts by itself.
        max_tokens: tokens of the caption that are kept at most.
        padding_side: where shorter prompts of a batch are padded; the features do not depend on it.
        dtype: what the weights are held and run in, and the features come in.
        revision: branch, tag or commit on the hub.
        template: chat: the tokenizer's chat template; plain: instruction and caption as text, closed by the end-of-text
            token, for base models that have no template.
    """

    def __init__(
        self,
        name: str,
        layer: int = -3,
        instruction: str = INSTRUCTION,
        system: str | None = None,
        max_tokens: int = 256,
        padding_side: Literal["right", "left"] = "right",
        dtype: Literal["bfloat16", "float32"] = "bfloat16",
        revision: str | None = None,
        template: Literal["chat", "plain"] = "chat",
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens of {name} is {max_tokens}; at least one token of a caption has to be kept")
        self.name, self.layer, self.instruction, self.system = name, layer, instruction, system
        self.max_tokens, self.padding_side, self.dtype = max_tokens, padding_side, dtype
        self.revision, self.template = revision, template
        self.cut = 0
        self._model: PreTrainedModel | None = None

    # ---- what it is, from small files alone

    @cached_property
    def _config(self) -> PreTrainedConfig:
        """The config of the whole model."""
        config = AutoConfig.from_pretrained(find_config(self.name, self.revision).parent)
        if config.is_encoder_decoder:
            raise ValueError(f"{self.name} is an encoder-decoder ({config.model_type}); name a decoder-only LLM")
        return config

    @property
    def width(self) -> int:
        """Channels e of a feature, from the config alone."""
        return self._config.get_text_config().hidden_size

    @property
    def depth(self) -> int:
        """Blocks that are run: those up to the tapped hidden state.

        Raises:
            ValueError: the model has no such hidden state.
        """
        blocks = self._config.get_text_config().num_hidden_layers
        if not -blocks - 1 <= self.layer <= blocks:
            raise ValueError(f"layer {self.layer}: {self.name} has hidden states {-blocks - 1} to {blocks}")
        return self.layer % (blocks + 1)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What features depend on: a cache made by another identity is stale. Padding is not part of it."""
        return {
            "name": self.name,
            "revision": find_revision(find_config(self.name, self.revision), self.name),
            "layer": self.layer,
            "template": hashlib.sha256(MARK.join(self._frame).encode()).hexdigest(),
            "instruction": self.instruction,
            "system": self.system,
            "max_tokens": self.max_tokens,
            "dtype": self.dtype,
        }

    # ---- prompt to tokens

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        find_config(self.name, self.revision)  # a wrong name is said here, before transformers is asked
        try:
            tokenizer = AutoTokenizer.from_pretrained(load_name(self.name), revision=self.revision)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(
                f"{self.name} has no tokenizer that loads ({str(error).splitlines()[0]}); put its tokenizer.json and "
                "tokenizer_config.json beside config.json"
            ) from None
        if not tokenizer.is_fast:
            raise ValueError(
                f"{self.name} has a slow tokenizer, which does not say where in the text a token is; "
                "convert it and save its tokenizer.json beside config.json"
            )
        return tokenizer

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """What is rendered before and after the content of the user's turn."""
        text = self._render(MARK)
        if text.count(MARK) != 1:
            raise ValueError(f"the chat template of {self.name} does not show the user's turn once: {text!r}")
        before, after = text.split(MARK)
        if not after:
            raise ValueError(f"the chat template of {self.name} puts nothing after the user's turn; use template=plain")
        return before, after

    def _render(self, content: str) -> str:
        """The text of a conversation that asks for an answer to this content."""
        tokenizer = self._tokenizer
        if self.template == "plain":
            return self._plain(content)
        if tokenizer.chat_template is None:
            raise ValueError(
                f"the tokenizer of {self.name} has no chat template: save one with it (chat_template.jinja), "
                "or use template=plain for instruction and caption as bare text"
            )
        turns = [{"role": "system", "content": self.system}] if self.system is not None else []
        try:
            return tokenizer.apply_chat_template(
                [*turns, {"role": "user", "content": content}],
                tokenize=False,
                add_generation_prompt=True,
                date_string="26 Jul 2024",  # Llama 3.1 and later put today's date otherwise: features would age
            )
        except TemplateError as error:
            raise ValueError(f"the chat template of {self.name} refuses the turns: {error}; try system=null") from None

    def _plain(self, content: str) -> str:
        """Content as bare text between the tokenizer's own first token, if it puts one, and its end-of-text token."""
        tokenizer = self._tokenizer
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {self.name} has no eos_token to close a plain prompt with; give it one")
        starts = tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return (tokenizer.bos_token if starts else "") + content + tokenizer.eos_token

    def _split(self, prompt: str) -> tuple[list[int], int, int]:
        """Token ids up to the one that closes the turn, index of the caption's first, and how many of it were cut."""
        caption = prompt.strip()  # many templates strip the turn
        content = f"{self.instruction} {caption}".strip()
        before, after = self._frame
        text = self._render(content)
        if text != before + content + after:
            raise ValueError(f"the chat template of {self.name} changes the caption {caption!r}: it renders {text!r}")
        end = len(before) + len(content)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        close = next(i for i, (start, _) in enumerate(offsets) if start >= end)
        first = next(i for i, (_, stop) in enumerate(offsets) if stop > end - len(caption) or i == close)
        kept = min(close, first + self.max_tokens)
        return ids[:kept] + [ids[close]], first, close - kept

    def show(self, prompt: str) -> list[tuple[str, bool]]:
        """The tokens that are run, in order, and whether each is kept as text for the denoiser."""
        ids, first, _ = self._split(prompt)
        texts = [self._tokenizer.decode([i]) for i in ids]
        names = self._tokenizer.convert_ids_to_tokens(ids)  # a part of a character has no text of its own
        return [(name if "\ufffd" in text else text, i >= first) for i, (text, name) in enumerate(zip(texts, names, strict=True))]

    # ---- tokens to features

    def load(self, device: str | torch.device = "cpu") -> FrozenLLM:
        """Read the needed weights once and put them on a device; again: only move them."""
        model = self._model if self._model is not None else self._read().eval().requires_grad_(False)
        self._model = model.to(device)
        return self

    def _read(self) -> PreTrainedModel:
        """Embeddings and the blocks up to the tapped one: no later block, no head, no vision tower is built or read."""
        whole = self._config
        config = truncate(whole.get_text_config(), self.depth)
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # that later blocks are left in the file is meant, not worth a report
        try:
            model, report = AutoModel.from_pretrained(
                load_name(self.name),
                revision=self.revision,
                config=config,
                dtype=getattr(torch, self.dtype),
                attn_implementation="sdpa",
                key_mapping=None if whole.get_text_config() is whole else TOWER,
                output_loading_info=True,
            )
        except OSError as error:
            raise FileNotFoundError(
                f"{self.name} has a config.json but no weights that can be read ({str(error).splitlines()[0]}); "
                "fetch it again, whole"
            ) from None
        finally:
            logging.set_verbosity(verbosity)
        if wrong := {kind: report[kind] for kind in ("missing_keys", "mismatched_keys") if report[kind]}:
            raise ValueError(f"the weights of {self.name} do not fit its config.json: {wrong}; fetch it again, whole")
        if self.depth < whole.get_text_config().num_hidden_layers:
            drop_final_norm(model, self.name)
        return model

    @torch.no_grad()
    def __call__(
        self, prompts: list[str]
    ) -> tuple[Float[Tensor, "b l e"], Bool[Tensor, "b l"], Int[Tensor, " b"]]:
        """Features of a batch, zero where padded; its mask; the index of each caption's first token.

        Raises:
            ValueError: there is no prompt, or a template or setting that does not work with this model.
        """
        if isinstance(prompts, str) or not prompts:
            raise ValueError(f"{self.name} encodes a list of at least one prompt, got {prompts!r}")
        if self._model is None:
            self.load()
        model = self._model
        splits = [self._split(prompt) for prompt in prompts]
        self._count(splits)
        ids, mask, start = self._pad(splits)
        ids, mask, start = ids.to(model.device), mask.to(model.device), start.to(model.device)
        with torch.autocast(model.device.type, enabled=False):  # cached and online features come from the same arithmetic
            states = model(
                input_ids=ids,
                attention_mask=mask.long(),
                position_ids=(mask.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
            ).last_hidden_state
        return states.masked_fill(~mask[..., None], 0), mask, start

    def _count(self, splits: list[tuple[list[int], int, int]]) -> None:
        """Count the captions that were cut, and say so at the first."""
        cut = [lost for _, _, lost in splits if lost]
        if cut and not self.cut:
            warnings.warn(
                f"{self.name}: a caption is {cut[0]} tokens longer than max_tokens={self.max_tokens} and is cut there; "
                "later ones are only counted",
                stacklevel=3,
            )
        self.cut += len(cut)

    def _pad(self, splits: list[tuple[list[int], int, int]]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (b l), mask (b l) and caption starts (b); what is in the padding does not matter."""
        length = max(len(ids) for ids, _, _ in splits)
        shifts = [length - len(ids) if self.padding_side == "left" else 0 for ids, _, _ in splits]
        batch = torch.zeros(len(splits), length, dtype=torch.long)
        mask = torch.zeros(len(splits), length, dtype=torch.bool)
        for row, ((ids, _, _), shift) in enumerate(zip(splits, shifts, strict=True)):
            batch[row, shift : shift + len(ids)] = torch.tensor(ids)
            mask[row, shift : shift + len(ids)] = True
        start = torch.tensor([first + shift for (_, first, _), shift in zip(splits, shifts, strict=True)])
        return batch, mask, start


def truncate(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The same model with its first blocks only."""
    values = config.to_dict()
    values |= {key: values[key][:depth] for key in LAYER_LISTS if isinstance(values.get(key), list)}
    return type(config).from_dict(values | {"num_hidden_layers": depth})


def drop_final_norm(model: PreTrainedModel, name: str) -> None:
    """Make the last built block the model's output: hidden states before the last are not normalised."""
    found = [key for key in FINAL_NORMS if isinstance(getattr(model, key, None), nn.Module)]
    if len(found) != 1:
        raise ValueError(
            f"{name} ({type(model).__name__}) keeps its final norm under none of {', '.join(FINAL_NORMS)}; "
            "only layer -1 of it can be read"
        )
    setattr(model, found[0], nn.Identity())
