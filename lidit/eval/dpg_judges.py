"""Judges of DPG-Bench: VQA models that answer its questions in words.

The authors' judge, mPLUG-large, is only in ModelScope. Ours are variants and are named so, `dpg-blip` and `dpg-MODEL`;
their numbers cannot be compared with published ones. What a judge is asked and what counts as its answer is written
here and in the result.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image

from lidit.eval.blip_vqa import DEC, ENC, BlipVQA
from lidit.eval.suite import BenchmarkError

BLIP_LENGTH, CHAT_LENGTH = 10, 8  # most tokens of an answer
ASK = "{question} Answer with yes or no only."


@runtime_checkable
class Judge(Protocol):
    """Answers questions about an image."""

    label: str

    def describe(self) -> dict:
        """What a result says about its judge."""

    def answers(self, image: UInt8[np.ndarray, "h w 3"], questions: Sequence[str]) -> list[str]:
        """One lower-case word for each question; only "yes" counts as yes."""


def first_word(answer: str) -> str:
    """An answer's first word in lower case, without the punctuation around it; empty if there is none."""
    found = re.search(r"\w+", answer.lower())
    return found[0] if found else ""


class BlipJudge(BlipVQA):
    """BLIP-VQA, which answers in words instead of probabilities.

    Each question is asked alone, cleaned as by `BlipVQA`; the answer is the first word that BLIP writes, greedily.

    Args:
        name: Hugging Face id or folder of the model.
        device: device to run on.
    """

    label = "dpg-blip"

    @torch.no_grad()
    def answers(self, image: UInt8[np.ndarray, "h w 3"], questions: Sequence[str]) -> list[str]:
        """One word for each question."""
        seen = self._model.vision_model(pixel_values=self.pixels(image)).last_hidden_state
        return [self._answer(seen, question) for question in questions]

    def _answer(self, seen: torch.Tensor, question: str) -> str:
        ids = torch.tensor([[ENC, *self._ids(question)[1:]]], device=self.device)
        read = self._model.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=seen
        ).last_hidden_state
        written = self._model.text_decoder.generate(
            input_ids=torch.full_like(ids[:, :1], DEC),
            encoder_hidden_states=read,
            encoder_attention_mask=torch.ones_like(ids),
            max_length=BLIP_LENGTH,
            eos_token_id=self._tokenizer.sep_token_id,
            pad_token_id=self._tokenizer.pad_token_id,
            do_sample=False,
        )
        return first_word(self._tokenizer.decode(written[0, 1:], skip_special_tokens=True))


class ChatJudge:
    """A chat model that reads images, such as Qwen-VL.

    The user asks `QUESTION Answer with yes or no only.` in one turn; the answer is the first word that the model
    writes, greedily.

    Args:
        name: Hugging Face id or folder for transformers' AutoModelForImageTextToText and AutoProcessor.
        device: device to run on.

    Raises:
        BenchmarkError: the model cannot be loaded, lacks weights or has no chat template.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.source, self.device = name, device
        folder = Path(name).expanduser()
        self.label = f"dpg-{(folder.resolve() if folder.is_dir() else Path(name)).name.lower()}"
        self._model, self._processor = _load_chat(name)
        self._model.to(device)
        self._processor.tokenizer.padding_side = "left"

    def describe(self) -> dict:
        """What a result says about its judge."""
        return {"model": self.source, "class": type(self._model).__name__, "question": ASK}

    @torch.no_grad()
    def answers(self, image: UInt8[np.ndarray, "h w 3"], questions: Sequence[str]) -> list[str]:
        """One word for each question, all asked in one batch.

        Raises:
            BenchmarkError: the model writes its thoughts before it answers.
        """
        picture = {"type": "image", "image": Image.fromarray(image)}
        texts = [{"type": "text", "text": ASK.format(question=question)} for question in questions]
        inputs = self._processor.apply_chat_template(
            [[{"role": "user", "content": [picture, text]}] for text in texts],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            processor_kwargs={"padding": True},
        ).to(self.device, self._model.dtype)
        written = self._model.generate(**inputs, max_new_tokens=CHAT_LENGTH, do_sample=False)
        new = written[:, inputs["input_ids"].shape[1] :]
        said = self._processor.batch_decode(new, skip_special_tokens=True)
        if any("<think>" in answer for answer in said):
            raise BenchmarkError(f"{self.source} thinks aloud before it answers; name an instruct model that does not")
        return [first_word(answer) for answer in said]


def load_judge(name: str, device: str = "cpu") -> Judge:
    """Load BLIP-VQA or a chat model, whichever the model's config says.

    Raises:
        BenchmarkError: the model cannot be loaded.
    """
    from transformers import AutoConfig

    try:
        kind = AutoConfig.from_pretrained(name).model_type
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error
    return BlipJudge(name, device) if kind == "blip" else ChatJudge(name, device)


def _load_chat(name: str) -> tuple:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    try:
        model, report = AutoModelForImageTextToText.from_pretrained(name, dtype="auto", output_loading_info=True)
        processor = AutoProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise _unloadable(name, error) from error
    if report["missing_keys"]:
        raise BenchmarkError(
            f"{name} lacks the weights {min(report['missing_keys'])} and others; fetch it again, whole"
        )
    if not getattr(processor, "chat_template", None):
        raise BenchmarkError(f"{name} has no chat template; name an instruct model")
    return model.eval(), processor


def _unloadable(name: str, error: Exception) -> BenchmarkError:
    reason = str(error).partition("\n")[0]
    return BenchmarkError(
        f"{name} cannot be loaded as a judge ({reason}); name a BLIP-VQA model or a chat model that reads images"
    )
