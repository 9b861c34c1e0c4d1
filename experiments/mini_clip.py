"""Train the bundled miniature scorers, a CLIP and a SigLIP, on drawn scenes, and measure them.

They stand in for ViT-L-14 and ViT-SO400M-14-SigLIP-384: open_clip models that are built from the recipe's model config,
trained with open_clip's own losses and saved in open_clip's format, so that everything that reads an open_clip folder
reads them unchanged.

    python -m experiments.mini_clip train --config experiments/configs/mini_clip.yaml
    python -m experiments.mini_clip card --out lidit/assets/clip --recipe experiments/configs/mini_clip.yaml
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Literal

import numpy as np
import open_clip
import torch
import yaml
from open_clip.loss import ClipLoss, SigLipLoss
from open_clip.model import CLIP, CustomTextCLIP
from PIL import Image
from safetensors.torch import save as to_bytes
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.functional.regression import spearman_corrcoef
from transformers import PreTrainedTokenizerFast

from experiments.cards import versions, write_card
from lidit.eval.suite import BenchmarkError, present, read_image
from lidit.pixels import signed
from lidit.scenes import benchmarks
from lidit.scenes.corpus import Example, examples, texts
from lidit.scenes.describe import dense_caption, short_caption
from lidit.scenes.judge import facts_held
from lidit.scenes.suites import ASKED, Twin

PAD, START, END = SPECIALS = ("<|pad|>", "<|start|>", "<|end|>")  # ids 0, 1, 2
MOST_SCALE = math.log(100)  # CLIP, 2.5: logits are scaled by no more than 100
GROUP = 64  # number of scenes among which one is to be found
# squash: a crop would lose the objects at the border of a wide or high image
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def make_tokenizer(vocabulary: int, corpus: Sequence[str]) -> PreTrainedTokenizerFast:
    """A lower-casing byte-level BPE tokenizer that puts a text between a start and an end token.

    A text that is too long loses words, but never its end token, at which CLIP pools.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(token, SPECIALS.index(token)) for token in (START, END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=START, eos_token=END, pad_token=PAD)


def complete(model: dict, tokenizer: PreTrainedTokenizerFast) -> dict:
    """The recipe's open_clip model config, completed with what the tokenizer determines."""
    config = deepcopy(model)
    config["text_cfg"] |= {
        "vocab_size": len(tokenizer),
        "pad_id": tokenizer.pad_token_id,
        "eos_id": tokenizer.eos_token_id,
        # for a local-dir model open_clip uses the tokenizer in the model's folder, whatever name is given here
        "hf_tokenizer_name": "local-dir",
    }
    return config


def make_model(config: dict) -> CLIP | CustomTextCLIP:
    """An untrained open_clip model of the class that `open_clip.create_model` would build."""
    arguments = deepcopy(config)
    return (CustomTextCLIP if arguments.pop("custom_text", False) else CLIP)(**arguments)


def save(folder: Path, model: CLIP | CustomTextCLIP, config: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    """Write float16 weights, config and tokenizer, so that open_clip loads `local-dir:FOLDER` from any place."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    record = {"model_cfg": config, "preprocess_cfg": PREPROCESS}
    (folder / "open_clip_config.json").write_text(json.dumps(record, indent=2) + "\n")
    weights = {n: (w.half() if w.is_floating_point() else w).contiguous() for n, w in model.state_dict().items()}
    (folder / "open_clip_model.safetensors").write_bytes(to_bytes(weights))


def batches(drawn: list[Example], size: int, dense_share: float, seed: int) -> Iterator[tuple[Tensor, list[str]]]:
    """Endless batches of images (b 3 h w) in [-1, 1] and captions, which are worded anew each time."""
    rng = np.random.default_rng(seed)
    images = torch.stack([torch.from_numpy(e.image) for e in drawn]).permute(0, 3, 1, 2).contiguous()
    while True:
        order = rng.permutation(len(drawn))
        for i in range(0, len(drawn) - size + 1, size):
            chosen = order[i : i + size]
            captions = [
                (dense_caption if rng.random() < dense_share else short_caption)(drawn[j].scene, rng).text
                for j in chosen
            ]
            yield signed(images[torch.from_numpy(chosen)]), captions


def disturb(pixels: Tensor) -> Tensor:
    """Blur, tint and add noise to images (b 3 h w), each to another degree, as a model draws that is still learning."""
    degree = torch.rand(3, len(pixels), 1, 1, 1).square()
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    tint = 0.15 * degree[1] * torch.randn(len(pixels), 3, 1, 1)
    return torch.lerp(pixels, blurred, degree[0]) + tint + 0.2 * degree[2] * torch.randn_like(pixels)


def decayed(model: CLIP | CustomTextCLIP) -> list[dict]:
    """Parameter groups for AdamW: as in open_clip, gains, biases and the logits' scale and bias do not decay."""
    matrices = [p for p in model.parameters() if p.ndim > 1]
    return [{"params": matrices}, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]


def train(
    out: str,
    loss: Literal["clip", "siglip"],
    model: dict,
    vocabulary: int = 512,
    steps: int = 2000,
    batch_size: int = 64,
    learning_rate: float = 2e-3,
    scenes: int = 12000,
    dense_share: float = 0.3,
    seed: int = 0,
    threads: int = 2,
) -> None:
    """Train a miniature scorer and save it as open_clip does, in float16.

    Args:
        out: folder to write.
        loss: open_clip's ClipLoss, a softmax over the batch, or SigLipLoss, a sigmoid per pair.
        model: open_clip's model config; vocabulary and special tokens are filled in.
        vocabulary: size of the byte-level BPE vocabulary.
        steps: optimizer steps.
        batch_size: pairs a step.
        learning_rate: peak learning rate, between a warm-up and a cosine to zero.
        scenes: number of drawn images to train on.
        dense_share: share of captions that are dense and cut to the context's length; the others are short.
        seed: decides weights, data and order.
        threads: CPU threads.

    Raises:
        ValueError: the model config lacks the logits' bias that the loss needs, or has one that it does not need.
    """
    if (loss == "siglip") != ("init_logit_bias" in model):
        raise ValueError("model.init_logit_bias belongs to the siglip loss: give it there, and only there")
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    tokenizer = make_tokenizer(vocabulary, list(texts(seed, 2000)))
    config = complete(model, tokenizer)
    network = make_model(config)
    print(f"{loss}: {sum(p.numel() for p in network.parameters()) / 1e6:.2f}M parameters", flush=True)
    stream = batches(list(examples(seed, scenes)), batch_size, dense_share, seed)
    optimize(network, tokenizer, stream, steps, learning_rate, loss)
    save(Path(out), network, config, tokenizer)


def optimize(
    model: CLIP | CustomTextCLIP,
    tokenizer: PreTrainedTokenizerFast,
    stream: Iterator[tuple[Tensor, list[str]]],
    steps: int,
    learning_rate: float,
    loss: Literal["clip", "siglip"],
) -> list[float]:
    """Train with AdamW, a warm-up and a cosine; return the loss of every step."""
    criterion = ClipLoss() if loss == "clip" else SigLipLoss()
    optimizer = torch.optim.AdamW(decayed(model), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
    start, cpu, losses = time.time(), time.process_time(), []
    model.train()
    for step in range(steps):
        pixels, captions = next(stream)
        value = criterion(*model(disturb(pixels), tokens(tokenizer, captions, model.context_length)))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, MOST_SCALE)
        losses.append(value.item())
        if step % 50 == 0 or step == steps - 1:
            spent = f"{time.time() - start:.0f}s, {time.process_time() - cpu:.0f}s of CPU"
            print(f"step {step} loss {np.mean(losses[-50:]):.4f} {spent}", flush=True)
    return losses


def tokens(tokenizer: PreTrainedTokenizerFast, captions: list[str], length: int) -> Tensor:
    """Token ids (b l) as open_clip's HFTokenizer gives them."""
    return tokenizer(captions, return_tensors="pt", max_length=length, padding="max_length", truncation=True).input_ids


class Scorer:
    """A trained scorer as any user loads it: open_clip reads model, preprocessing and tokenizer from the folder.

    Args:
        folder: the folder that `train` has written.
    """

    def __init__(self, folder: str):
        self.model, self.preprocess = open_clip.create_model_from_pretrained(f"local-dir:{folder}")
        self.tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
        self.model.eval()

    @torch.no_grad()
    def images(self, pixels: Sequence[np.ndarray]) -> Tensor:
        """Unit features (n d) of uint8 images of height x width x 3."""
        ready = torch.stack([self.preprocess(Image.fromarray(image)) for image in pixels])
        return torch.cat([self.model.encode_image(part, normalize=True) for part in ready.split(GROUP)])

    @torch.no_grad()
    def texts(self, captions: list[str]) -> Tensor:
        """Unit features (n d) of captions."""
        return torch.cat(
            [self.model.encode_text(part, normalize=True) for part in self.tokenizer(captions).split(GROUP)]
        )


def retrieval(images: Tensor, captions: Tensor) -> dict[str, float]:
    """Share of images (n d) whose own caption (n d) is the most similar one in their group of 64, and the reverse.

    Raises:
        ValueError: the pairs do not fill whole groups, or there is not one caption for each image.
    """
    if len(images) != len(captions) or not len(images) or len(images) % GROUP:
        raise ValueError(f"retrieval needs pairs in groups of {GROUP}, not {len(images)} images, {len(captions)} texts")
    similar = torch.einsum("gid,gjd->gij", images.unflatten(0, (-1, GROUP)), captions.unflatten(0, (-1, GROUP)))
    own = torch.arange(GROUP)
    shares = {"image_to_text": similar.argmax(2) == own, "text_to_image": similar.argmax(1) == own}
    return {name: round(float(right.float().mean()), 4) for name, right in shares.items()}


def judged(run: Path) -> tuple[list[np.ndarray], list[str], list[float]]:
    """Images and prompts of a run of a miniature benchmark, and the share of each prompt's facts that its image shows.

    Raises:
        BenchmarkError: the folder is not such a run, or images are missing.
    """
    if not (run / ASKED).is_file():
        raise BenchmarkError(f"{run / ASKED} is missing; draw the run with lidit sample --benchmark scenes-heldout")
    asked = json.loads((run / ASKED).read_text())
    questions = benchmarks.prompts(**asked)
    pictures = Twin(asked["benchmark"]).suite(asked["count_per_task"], asked["seed"]).pictures
    images = [read_image(run / path) for path in present(run, [p.path for p in pictures], allow_missing=False)]
    shares = [float(np.mean(facts_held(q.facts, image))) for q, image in zip(questions, images, strict=True)]
    return images, [q.text for q in questions], shares


def agreement(scorer: Scorer, stages: list[str]) -> dict:
    """Spearman's rank correlation of score and judge over the images of all runs, and the mean of both for each run.

    Raises:
        BenchmarkError: a folder is not a run of a miniature benchmark, or the judge sees no difference in any image.
    """
    scores, verdicts, means = [], [], []
    for stage in map(Path, stages):
        images, prompts, shares = judged(stage)
        cosines = (scorer.images(images) * scorer.texts(prompts)).sum(-1)
        scores.append(cosines)
        verdicts.append(torch.tensor(shares))
        means.append(
            {"run": stage.name, "score": round(float(cosines.mean()), 4), "judge": round(float(np.mean(shares)), 4)}
        )
    score, verdict = torch.cat(scores), torch.cat(verdicts)
    if verdict.unique().numel() == 1:
        raise BenchmarkError(
            f"the judge gives every image {float(verdict[0])}, so there are no ranks; use runs of other stages"
        )
    return {"spearman": round(float(spearman_corrcoef(score, verdict)), 4), "images": len(score), "stages": means}


def card(out: str, recipe: str, stages: list[str] | None = None, count: int = 1280, seed: int = 10_000) -> None:
    """Measure retrieval among held-out scenes and agreement with the judge, and write card.json beside the weights.

    Args:
        out: the trained scorer's folder.
        recipe: the YAML file it was trained with, whose name and seed are recorded.
        stages: folders that `lidit sample --benchmark scenes-heldout` wrote with models at several stages of training.
        count: number of held-out scenes, a multiple of 64.
        seed: seed of the held-out scenes.
    """
    scorer = Scorer(out)
    drawn = list(examples(seed, count, held=True))
    images = scorer.images([e.image for e in drawn])
    measured = {
        "short_captions": retrieval(images, scorer.texts([e.short.text for e in drawn])),
        "dense_captions": retrieval(images, scorer.texts([e.dense.text for e in drawn])),
        "parameters": sum(p.numel() for p in scorer.model.parameters()),
    }
    if stages:
        measured["judge"] = agreement(scorer, stages)
    write_card(
        Path(out),
        made_by=f"python -m experiments.mini_clip train --config {recipe}",
        seed=yaml.safe_load(Path(recipe).read_text())["seed"],
        data=f"drawn 64x64 scenes; top-1 retrieval among {GROUP} scenes, mean over {count // GROUP} groups of held-out "
        f"scenes of seed {seed}",
        measured=measured,
        versions=versions("torch", "open_clip_torch", "transformers", "tokenizers"),
    )


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli({"train": train, "card": card}, as_positional=False)
