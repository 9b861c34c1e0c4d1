"""A prompt in its chat: the instruction, the caption, and which tokens are the caption's (LI-DiT, Figure 5).

The text around the user's turn is read from the tokenizer's chat template by rendering a mark in its place, and tokens
are told apart by the characters they stand for. So a caption that repeats the instruction is still found, and no token
is counted by hand.
"""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from lidit.models.source import find_file, load_name

MARK = "lidit puts the turn here"


class Split(NamedTuple):
    """A prompt as tokens, up to and with the one that closes the user's turn."""

    ids: list[int]
    start: int  # index of the caption's first token; of the closing one when the caption is empty
    cut: int  # tokens of the caption beyond max_tokens, which are left out


class Prompts:
    """Turns captions into token ids for one LLM.

    Args:
        name: Hugging Face id, folder, or `bundled:NAME` of the LLM.
        instruction: sentence before the caption in the user's turn; empty: the caption alone.
        system: system prompt; none: what the template puts by itself.
        max_tokens: tokens of the caption that are kept at most.
        revision: branch, tag or commit on the hub.
        template: chat: the tokenizer's chat template; plain: bare text closed by the end-of-text token.
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
            raise ValueError(f"max_tokens of {name} is {max_tokens}; at least one token of a caption has to be kept")
        if template == "plain" and system is not None:
            raise ValueError(f"template=plain of {name} has no system turn; set system=null or template=chat")
        self.name, self.instruction, self.system = name, instruction, system
        self.max_tokens, self.revision, self.template = max_tokens, revision, template

    @property
    def identity(self) -> dict[str, Any]:
        """What token ids depend on, beside the tokenizer's files."""
        return {
            "template": hashlib.sha256(MARK.join(self._frame).encode()).hexdigest(),
            "instruction": self.instruction,
            "system": self.system,
            "max_tokens": self.max_tokens,
        }

    def split(self, prompt: str) -> Split:
        """Token ids of a prompt, with the caption's place in them.

        Raises:
            ValueError: the template changes the caption, so that its place cannot be told.
        """
        caption = prompt.strip()  # many templates strip the turn
        content = f"{self.instruction} {caption}".strip()
        before, after = self._frame
        text = self._render(content)
        if text != before + content + after:
            raise ValueError(f"the chat template of {self.name} changes the caption {caption!r}: it renders {text!r}")
        end = len(before) + len(content)
        # the rendered text holds the template's own beginning-of-text token: the tokenizer must not add a second
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
        # UNSTATED: which tokens become text; the caption's and the one that closes the turn: an empty one leaves one.
        close = next(i for i, (first, _) in enumerate(offsets) if first >= end)
        start = next(i for i, (_, last) in enumerate(offsets) if last > end - len(caption) or i == close)
        kept = min(close, start + self.max_tokens)
        return Split(ids[:kept] + [ids[close]], start, close - kept)

    def show(self, prompt: str) -> list[tuple[str, bool]]:
        """The tokens of a prompt as text, and whether each is kept for the denoiser."""
        ids, start, _ = self.split(prompt)
        names = [str(self.tokenizer.convert_ids_to_tokens(i)) for i in ids]
        texts = [str(self.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
        # a part of a character has no text of its own: show its name
        return [(names[i] if "\ufffd" in text else text, i >= start) for i, text in enumerate(texts)]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The LLM's fast tokenizer."""
        find_file(self.name, "config.json", self.revision)  # a wrong name is said here, before transformers is asked
        try:
            tokenizer = AutoTokenizer.from_pretrained(load_name(self.name), revision=self.revision)
        except (OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]
            raise FileNotFoundError(
                f"{self.name} has no tokenizer that loads ({reason}); "
                "put its tokenizer.json and tokenizer_config.json beside config.json"
            ) from None
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise ValueError(
                f"{self.name} has a slow tokenizer, which does not say where in the text a token is; "
                "convert it to a fast one and save its tokenizer.json beside config.json"
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
                date_string="26 Jul 2024",  # Llama 3.1 and later put today's date otherwise: no cache would last
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
        if isinstance(template, dict):  # several by name
            template = self.tokenizer.get_chat_template()
        if template is None:
            template = self._processor_template()
        return template, MARK not in self._chat(MARK, template, parts=False)

    def _processor_template(self) -> str:
        """The template beside the config, where LLaVA-type models of before 2025 keep it."""
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
        """The token that the tokenizer begins a text with, if it does, and its end-of-text token."""
        tokenizer = self.tokenizer
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {self.name} has no eos_token to close a plain prompt with; give it one")
        begins = tokenizer.bos_token is not None and tokenizer("").input_ids[:1] == [tokenizer.bos_token_id]
        return tokenizer.bos_token if begins else "", tokenizer.eos_token
