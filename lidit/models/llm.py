"""The frozen LLM: prompts, each placed after an instruction, become hidden states of a late block (LI-DiT, Figure 5).

The instruction asks the LLM to describe an image, so that its states hold attributes rather than only the next word.
Any decoder-only model that transformers knows will do; only the blocks that the features need are read and run.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from lidit.models.chat import Prompts, Split
from lidit.models.contracts import Measured, is_caption
from lidit.models.source import describe, find_file, load_name

INSTRUCTION = (
    "Describe the image by detailing the color, shape, size, texture, quantity, text, "
    "and spatial relationships of the objects:"
)
FINAL_NORMS = ("norm", "ln_f", "final_layernorm", "final_layer_norm")  # Llama to Gemma; GPT-2, Falcon; Phi; GPT-NeoX
LAYER_LISTS = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type")  # an entry per block
TOWER = {r"^(model\.)?language_model\.(model\.)?": ""}  # LLaVA-type names of the language tower, old and new


class FrozenLLM:
    """A frozen decoder-only LLM, or the language tower of a LLaVA-type model; no checkpoint holds its weights.

    The denoiser reads an encoded prompt's caption and the one token that closes the user's turn, so that an empty
    caption still leaves one token. `cut` counts the captions so far that were longer than `max_tokens`.

    Args:
        name: the LLM's Hugging Face id, folder, or `bundled:NAME`.
        layer: number of the hidden state that becomes the features, as transformers counts: 0 is the embeddings, -1 the
            last block's after the final norm, -3 the third-to-last block's (the paper's choice).
        instruction: sentence before the caption in the user's turn; if empty, the turn is the caption alone.
        system: system prompt; null leaves it to the chat template.
        max_tokens: largest number of caption tokens; a longer caption is cut.
        padding_side: side on which the shorter prompts of a batch are padded; the features do not depend on it.
        dtype: precision of the weights, of the computation and of the features; int8 holds linear layers in 8 bits
            (LLM.int8, Dettmers et al. 2022; needs the extra `llm8bit`) and gives features in bfloat16.
        sharded: with several ranks, each holds a share of the weights, and a block's are gathered while it runs; every
            rank must then encode equally often.
        revision: branch, tag or commit on the Hugging Face hub.
        template: chat: the tokenizer's chat template; plain: instruction and caption as text, closed by the end-of-text
            token, for base models that have no template.
    """

    AUTO: Any = AutoModel  # the class of transformers that picks the model's own class
    OUTPUTS: dict[str, bool] = {}  # arguments that make a forward pass return more than the last hidden state

    def __init__(
        self,
        name: str,
        layer: int = -3,
        instruction: str = INSTRUCTION,
        system: str | None = None,
        max_tokens: int = 256,
        padding_side: Literal["right", "left"] = "right",
        dtype: Literal["bfloat16", "float32", "int8"] = "bfloat16",
        revision: str | None = None,
        template: Literal["chat", "plain"] = "chat",
        sharded: bool = False,
    ) -> None:
        if sharded and dtype == "int8":
            raise ValueError(f"{name}: weights in int8 are not sharded; choose sharded: false or dtype: bfloat16")
        self.name, self.layer, self.padding_side = name, layer, padding_side
        self.dtype, self.revision, self.sharded = dtype, revision, sharded
        self.prompts = Prompts(name, instruction, system, max_tokens, revision, template)
        self.cut = 0
        self.distribute: Callable[[FrozenLLM, torch.device], Any] | None = None  # `parallel.py` sets it
        self._model: Any = None  # a PreTrainedModel; type checkers misread its decorated methods

    @cached_property
    def _config_file(self) -> Path:
        return find_file(self.name, "config.json", self.revision)

    @cached_property
    def _config(self) -> PreTrainedConfig:
        """The config of the whole model."""
        kind = json.loads(self._config_file.read_text()).get("model_type")
        if kind not in CONFIG_MAPPING:
            raise ValueError(f"{self.name}: transformers does not know model type {kind!r}; name a decoder-only LLM")
        config = AutoConfig.from_pretrained(self._config_file.parent)
        self._check_kind(config)
        return config

    def _check_kind(self, config: PreTrainedConfig) -> None:
        if config.is_encoder_decoder:
            raise ValueError(
                f"{self.name} is an encoder-decoder ({config.model_type}); name a decoder-only LLM, or for a T5 "
                "class_path: lidit.models.t5.FrozenT5"
            )

    @property
    def width(self) -> int:
        """Channels e of a feature; only the config is read."""
        return self._config.get_text_config().hidden_size

    @property
    def depth(self) -> int:
        """Number of blocks that run: those up to the hidden state that becomes the features.

        Raises:
            ValueError: the model has no hidden state of this `layer`.
        """
        blocks = self._config.get_text_config().num_hidden_layers
        if not -blocks - 1 <= self.layer <= blocks:
            raise ValueError(f"layer {self.layer}: {self.name} has hidden states {-blocks - 1} to {blocks}")
        return self.layer % (blocks + 1)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All that the features depend on (not the padding); a cache made with another identity is stale."""
        source = describe(self.name, self._config_file)
        return {**source, "layer": self.layer, "dtype": self.dtype, **self.prompts.identity}

    def show(self, prompt: str) -> list[tuple[str, bool]]:
        """A prompt's tokens as text, in order, each with whether the denoiser reads it."""
        return self.prompts.show(prompt)

    def load(self, device: str | torch.device = "cpu") -> FrozenLLM:
        """Put the LLM on a device; the first call reads its weights, later ones only move them."""
        if self._model is None:
            device = torch.device(device)
            self._model = self.distribute(self, device) if self.distribute else self.read(device)
        elif not self.distribute and self._model.device != device:
            self._model.to(device)
        return self

    @property
    def loaded(self) -> bool:
        """Whether the LLM's weights have been read."""
        return self._model is not None

    def read(self, device: str | torch.device = "cpu") -> PreTrainedModel:
        """The LLM up to the block that gives the features: no later block, head or vision tower is built or read."""
        text = self._config.get_text_config()
        held = quantized(device) if self.dtype == "int8" else {"dtype": getattr(torch, self.dtype)}
        try:
            with quiet():
                model, report = self.AUTO.from_pretrained(
                    load_name(self.name),
                    revision=self.revision,
                    config=self._needed(),
                    attn_implementation="sdpa",
                    key_mapping=None if text is self._config else TOWER,
                    output_loading_info=True,
                    **held,
                )
        except OSError as error:
            reason = str(error).partition("\n")[0]
            raise FileNotFoundError(
                f"{self.name} has a config.json but no weights that can be read ({reason}); download all of it again"
            ) from None
        if wrong := {kind: report[kind] for kind in ("missing_keys", "mismatched_keys") if report[kind]}:
            raise ValueError(
                f"the weights of {self.name} do not fit its config.json: {wrong}; download all of it again"
            )
        return self._frozen(model if self.dtype == "int8" else model.to(device))

    @property
    def nbytes(self) -> int:
        """Bytes of the weights that run, from the config alone; approximate for int8."""
        weights = self.skeleton().parameters()
        return sum(p.numel() * (1 if self.dtype == "int8" else p.itemsize) for p in weights)

    def skeleton(self) -> PreTrainedModel:
        """The model that `read` returns, on the meta device: shapes that take no memory."""
        with torch.device("meta"):
            dtype = torch.bfloat16 if self.dtype == "int8" else getattr(torch, self.dtype)
            return self._frozen(self._untrained(dtype))

    def _untrained(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model of the config, with new weights."""
        return self.AUTO.from_config(self._needed(), dtype=dtype, attn_implementation="sdpa")

    def _needed(self) -> PreTrainedConfig:
        """The config of the part of the model that is read."""
        return _first_blocks(self._config.get_text_config(), self.depth)

    def _stack(self, model: Any) -> Any:
        """The module that holds the blocks and the final norm."""
        return model

    def _frozen(self, model: PreTrainedModel) -> PreTrainedModel:
        if self.depth < self._config.get_text_config().num_hidden_layers:
            drop_final_norm(self._stack(model), self.name)
        return model.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> tuple[Float[Tensor, "b l e"], Bool[Tensor, "b l"], Int[Tensor, " b"]]:
        """Features of prompts, zero where padded; their mask; the index of each caption's first token.

        Raises:
            ValueError: the list is empty, or the template or a setting does not work with this model.
        """
        if not prompts or isinstance(prompts, str):  # to Python a str is a list of letters
            raise ValueError(f"{self.name} encodes a list of at least one prompt, got {prompts!r}")
        model = self._model or self.load()._model
        splits = [self.prompts.split(prompt) for prompt in prompts]
        self._count(splits)
        ids, mask, start = self._pad(splits)
        longest = int(is_caption(mask, start).numpy().sum(1).max())  # of tensors that are not on the device yet
        # none of these waits for the device: what is copied from ordinary memory is read before `to` returns
        ids, mask, start = (each.to(model.device, non_blocking=True) for each in (ids, mask, start))
        with torch.autocast(model.device.type, enabled=False):  # so that cached and online features are equal
            states = self._states(model, ids, mask, self._shared(splits))
        return Measured.of((states.masked_fill(~mask[..., None], 0), mask, start), longest)

    def _shared(self, splits: list[Split]) -> int:
        """Number of first tokens (template and instruction) that all prompts of a batch have in common."""
        if len(splits) == 1 or self.padding_side == "left" or self.distribute:  # sharded: ranks run equally often
            return 0
        shortest = min(len(ids) for ids, _, _ in splits)
        return min(len(os.path.commonprefix([ids for ids, _, _ in splits])), shortest - 1)

    def _states(
        self, model: Any, ids: Int[Tensor, "b l"], mask: Bool[Tensor, "b l"], shared: int
    ) -> Float[Tensor, "b l e"]:
        """Hidden states; the shared first tokens see no later ones (causal mask), so they run once for all rows."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        if not shared:
            return self._tapped(
                model(
                    input_ids=ids, attention_mask=mask.long(), position_ids=positions, use_cache=False, **self.OUTPUTS
                )
            )
        first = model(input_ids=ids[:1, :shared], use_cache=True, **self.OUTPUTS)
        word = "cache" if "cache" in first else "past_key_values"  # transformers before 5.24
        cache = first[word]
        cache.batch_repeat_interleave(len(ids))
        rest = model(
            input_ids=ids[:, shared:],
            attention_mask=mask.long(),
            position_ids=positions[:, shared:],
            use_cache=True,
            **{word: cache},
            **self.OUTPUTS,
        )
        return torch.cat([self._tapped(first).expand(len(ids), -1, -1), self._tapped(rest)], 1)

    def _tapped(self, output: Any) -> Float[Tensor, "b l e"]:
        """The features in a forward pass's output: the last hidden state."""
        return output.last_hidden_state

    def _count(self, splits: list[Split]) -> None:
        """Count the captions that were cut, and warn at the first."""
        cut = [lost for _, _, lost in splits if lost]
        if cut and not self.cut:
            warnings.warn(
                f"{self.name}: a caption is {cut[0]} tokens longer than max_tokens={self.prompts.max_tokens} "
                "and is cut there; further cuts are only counted",
                stacklevel=4,  # names the caller of __call__, past its no_grad
            )
        self.cut += len(cut)

    def _pad(self, splits: list[Split]) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids (b l), mask (b l) and caption starts (b); the ids in the padding do not matter."""
        length = max(len(ids) for ids, _, _ in splits)
        shifts = [length - len(ids) if self.padding_side == "left" else 0 for ids, _, _ in splits]
        batch = torch.zeros(len(splits), length, dtype=torch.long)
        mask = torch.zeros(len(splits), length, dtype=torch.bool)
        for row, ((ids, _, _), shift) in enumerate(zip(splits, shifts, strict=True)):
            batch[row, shift : shift + len(ids)] = torch.tensor(ids)
            mask[row, shift : shift + len(ids)] = True
        start = torch.tensor([first + shift for (_, first, _), shift in zip(splits, shifts, strict=True)])
        return batch, mask, start


def quantized(device: str | torch.device) -> dict[str, Any]:
    """Arguments of `from_pretrained` that hold linear layers in 8 bits.

    Raises:
        ValueError: bitsandbytes or accelerate is not installed.
    """
    if not all(find_spec(package) for package in ("bitsandbytes", "accelerate")):
        raise ValueError("dtype int8 of an LLM needs bitsandbytes; install it with `pip install 'lidit[llm8bit]'`")
    return {
        "quantization_config": BitsAndBytesConfig(load_in_8bit=True),
        "dtype": torch.bfloat16,
        "device_map": {"": device},
    }


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers from reporting weights that are not read on purpose."""
    verbosity, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bar:
            logging.enable_progress_bar()


def _first_blocks(config: PreTrainedConfig, depth: int) -> PreTrainedConfig:
    """The config of the same model with its first `depth` blocks only."""
    values = config.to_dict()
    values |= {key: values[key][:depth] for key in LAYER_LISTS if isinstance(values.get(key), list)}
    return type(config).from_dict(values | {"num_hidden_layers": depth})


def drop_final_norm(model: nn.Module, name: str) -> None:
    """Remove the final norm, which belongs to the hidden state after the last block alone."""
    found = [key for key in FINAL_NORMS if isinstance(getattr(model, key, None), nn.Module)]
    if len(found) != 1:
        raise ValueError(
            f"{name} ({type(model).__name__}) has its final norm under none of the names {', '.join(FINAL_NORMS)}; "
            "only layer -1 of it can be read"
        )
    setattr(model, found[0], nn.Identity())
