"""BLIP-VQA, the judge of T2I-CompBench and of positional bias: how likely it answers "yes" to a question.

The protocol is T2I-CompBench's (Huang et al., 2023), on the VQA model of BLIP (Li et al., 2022). The official weights
are `model_base_vqa_capfilt_large.pth` of github.com/salesforce/BLIP, which `convert` makes into a transformers folder:

    python -m lidit.eval.blip_vqa model_base_vqa_capfilt_large.pth google-bert/bert-base-uncased blip-vqa-480

Scores by such a folder are called `blipvqa`. The hub's Salesforce/blip-vqa-* hold the same weights with the positions
resampled to 384 px: this is another judge, called `blipvqa-hf384`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from PIL import Image
from torch import Tensor

from lidit.eval.suite import BenchmarkError

ENC, DEC = 30523, 30522  # [ENC] opens a question, [DEC] an answer: the two tokens after BERT's 30,522
YES, NO = 2748, 2053
VOCABULARY = 30524
MAX_WORDS, MAX_TOKENS = 50, 35
IMAGE_SIZE = 480
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
SOURCE = "original_sha256"  # key in the config of a folder that `convert` wrote
# names in BLIP's files -> names in transformers; those of the text towers are the same
RENAMED = {
    r"^visual_encoder\.cls_token$": "vision_model.embeddings.class_embedding",
    r"^visual_encoder\.pos_embed$": "vision_model.embeddings.position_embedding",
    r"^visual_encoder\.patch_embed\.proj\.": "vision_model.embeddings.patch_embedding.",
    r"^visual_encoder\.norm\.": "vision_model.post_layernorm.",
    r"^visual_encoder\.blocks\.(\d+)\.norm": r"vision_model.encoder.layers.\1.layer_norm",
    r"^visual_encoder\.blocks\.(\d+)\.attn\.proj\.": r"vision_model.encoder.layers.\1.self_attn.projection.",
    r"^visual_encoder\.blocks\.(\d+)\.attn\.": r"vision_model.encoder.layers.\1.self_attn.",
    r"^visual_encoder\.blocks\.": "vision_model.encoder.layers.",
}


def cleaned(question: str) -> str:
    """A question as the tokenizer gets it: lower case, without . ! " ( ) * # : ; ~, at most 50 words."""
    plain = re.sub(r"[.!\"()*#:;~]", "", question.lower()).rstrip(" ")
    return " ".join(plain.split(" ")[:MAX_WORDS])


def yes_probability(logits: Float[Tensor, "b vocabulary"]) -> Float[Tensor, " b"]:
    """p(yes) / (p(yes) + p(no)) in the softmax of an answer's first token, without 0 / 0 if both logits are low."""
    return torch.sigmoid(logits[:, YES].float() - logits[:, NO].float())


def four_decimals(value: float) -> float:
    """A number rounded as the official scripts write it to a file before they read it again."""
    return float(f"{value:.4f}")


class BlipVQA:
    """BLIP-VQA as a judge.

    Only questions of the same number of tokens share a batch, so that none is padded: transformers' cross-attention
    drops the mask (`BlipTextAttention` does not pass it on), and padding would change the answers.

    Args:
        name: Hugging Face id or folder of a `BlipForQuestionAnswering` with its tokenizer.
        device: device to run on.

    Raises:
        BenchmarkError: the model cannot be loaded, lacks weights, or has another vocabulary or number of heads.
    """

    def __init__(self, name: str, device: str = "cpu") -> None:
        self.source, self.device = name, device
        self._model, self._tokenizer = _load(name)
        self._model.to(device)
        self.size = int(self._model.config.vision_config.image_size)

    @property
    def name(self) -> str:
        """`blipvqa` for the official weights (from `convert`), and `blipvqa-hfSIZE` for others."""
        official = getattr(self._model.config, SOURCE, None) and self.size == IMAGE_SIZE
        return "blipvqa" if official else f"blipvqa-hf{self.size}"

    def describe(self) -> dict:
        """What a result says about its judge."""
        found = {"name": self.name, "model": self.source, "image_size": self.size}
        sha = getattr(self._model.config, SOURCE, None)
        return found | ({SOURCE: sha} if sha else {})

    @torch.no_grad()
    def __call__(self, image: UInt8[np.ndarray, "h w 3"], questions: Sequence[str]) -> list[float]:
        """Each question's p(yes) in [0, 1], not rounded; questions are cleaned here.

        Raises:
            ValueError: a question is empty; the benchmarks count an empty question as 1 without asking.
        """
        if not all(questions):
            raise ValueError("BLIP-VQA was asked an empty question; leave it out")
        if not questions:
            return []
        seen = self._model.vision_model(pixel_values=self.pixels(image)).last_hidden_state
        ids = [self._ids(question) for question in questions]
        answers = torch.zeros(len(ids))
        for length in sorted({len(i) for i in ids}):
            rows = [row for row, i in enumerate(ids) if len(i) == length]
            answers[rows] = self.ask(seen, torch.tensor([ids[row] for row in rows])).cpu()
        return answers.tolist()

    def pixels(self, image: UInt8[np.ndarray, "h w 3"]) -> Float[Tensor, "1 3 s s"]:
        """The image squashed to a square by bicubic resampling, and normalised as for CLIP."""
        squashed = Image.fromarray(image).resize((self.size, self.size), Image.Resampling.BICUBIC)
        pixels = (np.asarray(squashed, np.float32) / 255 - np.float32(MEAN)) / np.float32(STD)
        return torch.from_numpy(pixels).permute(2, 0, 1)[None].to(self.device)

    def ask(self, seen: Float[Tensor, "1 p e"], ids: Int[Tensor, "b l"]) -> Float[Tensor, " b"]:
        """p(yes) of questions of one length about one image's features; each first id is replaced by [ENC]."""
        ids = torch.cat([torch.full_like(ids[:, :1], ENC), ids[:, 1:]], dim=1).to(self.device)
        read = self._model.text_encoder(
            input_ids=ids, attention_mask=torch.ones_like(ids), encoder_hidden_states=seen.expand(len(ids), -1, -1)
        ).last_hidden_state
        start = torch.full_like(ids[:, :1], DEC)
        return yes_probability(self._model.text_decoder(input_ids=start, encoder_hidden_states=read).logits[:, 0])

    def _ids(self, question: str) -> list[int]:
        return self._tokenizer(cleaned(question), truncation=True, max_length=MAX_TOKENS)["input_ids"]


def convert(original: Path, tokenizer: str, out: Path) -> None:
    """Convert BLIP's own checkpoint of its VQA model (ViT-B/16, 480 px) to a folder for `BlipVQA`, without any loss.

    Args:
        original: `model_base_vqa_capfilt_large.pth`, from the links in the README of github.com/salesforce/BLIP.
        tokenizer: Hugging Face id or folder of bert-base-uncased.
        out: folder to write.

    Raises:
        BenchmarkError: the file holds the weights of another model.
    """
    from hashlib import file_digest

    from transformers import AutoTokenizer, BlipConfig, BlipForQuestionAnswering

    with original.open("rb") as file:
        digest = file_digest(file, "sha256").hexdigest()
    # BLIP was trained with these values; transformers' defaults are 8 text heads and 1e-5
    config = BlipConfig(
        vision_config={"image_size": IMAGE_SIZE, "layer_norm_eps": 1e-6}, text_config={"num_attention_heads": 12}
    )
    setattr(config, SOURCE, digest)
    model = BlipForQuestionAnswering(config)
    try:
        model.load_state_dict(renamed(torch.load(original, map_location="cpu", weights_only=True)["model"]))
    except (KeyError, RuntimeError) as error:
        raise BenchmarkError(f"{original} is not model_base_vqa_capfilt_large.pth: {error}") from error
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(out)


def renamed(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights by transformers' names instead of BLIP's; position_ids, which are not weights, are left out."""
    found = {}
    for name, weight in weights.items():
        if name.endswith("position_ids"):
            continue
        for pattern, replacement in RENAMED.items():
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                break
        found[name] = weight
    return found


def _load(name: str) -> tuple:
    from transformers import AutoConfig, AutoTokenizer, BlipForQuestionAnswering

    try:
        config = AutoConfig.from_pretrained(name)
        if config.model_type != "blip":
            raise BenchmarkError(f"{name} is a {config.model_type} model; name a BlipForQuestionAnswering")
        model, report = BlipForQuestionAnswering.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        if isinstance(error, BenchmarkError):
            raise
        raise BenchmarkError(
            f"{name} cannot be loaded as a BLIP-VQA model: {error}; name a Hugging Face id or a folder with "
            "config.json, weights and tokenizer"
        ) from error
    if report["missing_keys"]:
        raise BenchmarkError(f"{name} is not a VQA model: it lacks {min(report['missing_keys'])} and others")
    _check(name, model.config.text_config, tokenizer)
    return model.eval(), tokenizer


def _check(name: str, text, tokenizer) -> None:
    ids = tokenizer.convert_tokens_to_ids(["yes", "no"])
    if text.vocab_size != VOCABULARY or ids != [YES, NO]:
        raise BenchmarkError(
            f"{name} has {text.vocab_size} tokens, with yes and no at {ids}; BLIP-VQA has {VOCABULARY}, {[YES, NO]}"
        )
    if text.hidden_size == 768 and text.num_attention_heads != 12:
        raise BenchmarkError(
            f"{name} has text towers with {text.num_attention_heads} heads, an early mistake of the hub's "
            "configs; BLIP has 12: set text_config.num_attention_heads in its config.json"
        )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(convert)
