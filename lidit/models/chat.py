"""A prompt as a turn of a chat: its tokens, and which of them are the caption's (LI-DiT, Figure 5).

The text around the user's turn is found by rendering the tokenizer's chat template with a mark in place of the turn.
Which tokens are the caption's follows from the characters that they stand for. So a caption that repeats the
instruction is still found, and no token is counted by hand.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lidit.models.source import find_file, load_name

MARK = "lidit puts the turn here"


class Split(NamedTuple):
    """A prompt's token ids, up to and including the token that closes the user's turn."""

    ids: list[int]
    start: int  # index of the caption's first token; if the caption is empty, of the closing token
    cut: int  # number of caption tokens beyond max_tokens, which are left out


class Prompts:
    """Turns captions into token ids for one LLM.

    Args:
        name: the LLM's Hugging Face id, folder, or `bundled:NAME`.
        instruction: sentence before the caption in the user's turn; if empty, the turn is the caption alone.
        system: system prompt; None leaves it to the chat template.
        max_tokens: largest number of caption tokens; a longer caption is cut.
        revision: branch, tag or commit on the Hugging Face hub.
        template: chat: the tokenizer's chat template; plain: bare text closed by the end-of-text token.

    Raises:
        ValueError: max_tokens is below 1, or a plain template is given a system prompt.
    """

    def __init__(
        self,
        name: str,
        instruction: str,
        system: str | None,
        max_tokens: int,
        revision: str | None,
        template: Literal["chat", "plain"],
    ) -> None:
        if max_tokens < 1:
            raise ValueError(f"max_tokens of {name} is {max_tokens}; it must be at least 1")
        if template == "plain" and system is not None:
            raise ValueError(f"template=plain of {name} has no system turn; set system=null or template=chat")
        self.name, self.instruction, self.system = name, instruction, system
        self.max_tokens, self.revision, self.template = max_tokens, revision, template
        self.known: dict[str, Split] = {}  # of the captions of a batch, see `ReadAhead`

    @property
    def identity(self) -> dict[str, Any]:
        """What the token ids depend on besides the tokenizer's files."""
        return {
            "template": hashlib.sha256(MARK.join(self._frame).encode()).hexdigest(),
            "instruction": self.instruction,
            "system": self.system,
            "max_tokens": self.max_tokens,
        }

    def split(self, prompt: str) -> Split:
        """Token ids of a prompt, and where the caption is in them.

        Raises:
            ValueError: the template changes the caption, so that it cannot be found.
        """
        if prompt in self.known:
            return self.known[prompt]
        caption = prompt.strip()  # many templates strip white space from the turn
        content = f"{self.instruction} {caption}".strip()
        before, after = self._frame
        text = self._render(content)
        if text != before + content + after:
            raise ValueError(f"the chat template of {self.name} changes the caption {caption!r}: it renders {text!r}")
        end = len(before) + len(content)
        # the rendered text holds the template's own beginning-of-text token: the tokenizer must not add a second
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # UNSTATED: which tokens the denoiser reads; the caption's and the closing one, so an empty caption leaves one.
        close = next(i for i, (first, _) in enumerate(offsets) if first >= end)
        start = next(i for i, (_, last) in enumerate(offsets) if last > end - len(caption) or i == close)
        stop = min(close, start + self.max_tokens)
        return Split(ids[:stop] + [ids[close]], start, close - stop)

    def show(self, prompt: str) -> list[tuple[str, bool]]:
        """A prompt's tokens as text, in order, each with whether the denoiser reads it."""
        ids, start, _ = self.split(prompt)
        names = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in ids]
        texts = [str(self.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
        # a token that is part of a character has no text of its own: show its name
        return [(names[i] if "\ufffd" in text else text, i >= start) for i, text in enumerate(texts)]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The LLM's fast tokenizer."""
        find_file(self.name, "config.json", self.revision)  # a wrong name is an error here, not in transformers
        tokenizer = read_tokenizer(self.name, self.revision)
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"{self.name} has a slow tokenizer, which does not say where in the text a token is; "
                "convert it to a fast one and save its tokenizer.json beside config.json"
            )
        return tokenizer

    @cached_property
    def _frame(self) -> tuple[str, str]:
        """The text that the template puts before and after the content of the user's turn."""
        text = self._render(MARK)
        if text.count(MARK) != 1:
            raise ValueError(f"the chat template of {self.name} does not show the user's turn once: {text!r}")
        before, after = text.split(MARK)
        if not after:
            raise ValueError(f"the chat template of {self.name} puts nothing after the user's turn; use template=plain")
        return before, after

    def _render(self, content: str) -> str:
        """The text of a chat in which the user says this content and an answer is to follow."""
        if self.template == "plain":
            begin, end = self._plain
            return begin + content + end
        return self._chat(content, *self._chat_template)

    def _chat(self, content: str, template: str, parts: bool) -> str:
        # UNSTATED: the paper does not give its system prompt; we take the template's own unless one is given.
        said = [("system", self.system)] if self.system is not None else []
        turns: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if parts else text}
            for role, text in [*said, ("user", content)]
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                turns,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
                date_string="26 Jul 2024",  # else Llama 3.1 and later put today's date, and no cache would last
            )
            return str(text)
        except (TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template of {self.name} does not take these turns ({error}); "
                "try system=null, or template=plain for instruction and caption as bare text"
            ) from None

    @cached_property
    def _chat_template(self) -> tuple[str, bool]:
        """The template, and whether it wants a turn's content as a list of parts, as those of LLaVA-type models do."""
        template = self.tokenizer.chat_template
        if isinstance(template, dict):  # several templates, by name
            template = self.tokenizer.get_chat_template()
        if template is None:
            template = self._processor_template()
        return template, MARK not in self._chat(MARK, template, parts=False)

    def _processor_template(self) -> str:
        """The template in a file of its own, where LLaVA-type models from before 2025 have it."""
        try:
            file = find_file(self.name, "chat_template.json", self.revision)
        except FileNotFoundError:
            raise ValueError(
                f"the tokenizer of {self.name} has no chat template: put a chat_template.jinja beside its "
                "tokenizer.json, or use template=plain for instruction and caption as bare text"
            ) from None
        return json.loads(file.read_text())["chat_template"]

    @cached_property
    def _plain(self) -> tuple[str, str]:
        """The tokenizer's beginning-of-text token, empty if it adds none, and its end-of-text token."""
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {self.name} has no eos_token to close a plain prompt with; give it one")
        begins = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return tokenizer.bos_token if begins else "", tokenizer.eos_token


class ReadAhead:
    """What the LLMs' tokenizers make of a batch's captions, made by the processes that read data, before the step.

    Args:
        prompts: of each LLM.
        captions: of the batch.
    """

    def __init__(self, prompts: Sequence[Prompts], captions: Sequence[str]) -> None:
        self.splits = [{caption: each.split(caption) for caption in captions} for each in prompts]

    def give(self, prompts: Sequence[Prompts]) -> None:
        """Let the LLMs of the process that trains know them, in place of those of the batch before."""
        for each, splits in zip(prompts, self.splits, strict=True):
            each.known = splits


def read_tokenizer(name: str, revision: str | None, **settings: Any) -> Any:
    """The tokenizer of transformers that belongs to an LLM.

    Args:
        name: the LLM's Hugging Face id, folder, or `bundled:NAME`.
        revision: branch, tag or commit on the Hugging Face hub.
        settings: other arguments of `AutoTokenizer.from_pretrained`.

    Raises:
        FileNotFoundError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(load_name(name), revision=revision, **settings)
        reason = "it has no words but special ones"  # transformers makes one of nothing for some types of models
    except (OSError, ValueError) as error:
        tokenizer, reason = None, str(error).partition("\n")[0]
    if tokenizer is None or len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise FileNotFoundError(
            f"{name} has no tokenizer that loads ({reason}); "
            "put its tokenizer.json and tokenizer_config.json beside config.json"
        )
    return tokenizer
