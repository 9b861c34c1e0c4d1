"""The verbs that draw: a sentence or a file of them; and `encode`, which shows what the transformer gets to read."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lidit import benchmark
from lidit.arguments import call, take
from lidit.devices import Precision, name_of
from lidit.models.llm import FrozenLLM
from lidit.pictures import parse_size, save_image
from lidit.pipeline import BUNDLED, Pipeline


def main(argv: list[str]) -> None:
    """`lidit sample`: sentences, or with `--benchmark NAME` a benchmark's pictures."""
    name, rest = take(argv, "--benchmark")
    if name is None:
        call(sample, "lidit sample", rest)
    else:
        benchmark.sample(rest, name)


def sample(
    prompt: str | None = None,
    out: str = "out.png",
    prompts: str | None = None,
    n: int = 1,
    seed: int = 0,
    steps: int = 25,
    guidance: float = 3.0,
    size: str | None = None,
    sampler: Literal["euler", "heun", "ddim"] | None = None,
    checkpoint: str = BUNDLED,
    ema: bool = True,
    dtype: Precision = "auto",
    device: str = "auto",
    trust: list[str] | str | None = None,
) -> None:
    """Draw what a sentence says; `lidit sample --benchmark NAME --help` tells how to draw a benchmark's pictures.

    Args:
        prompt: the sentence.
        out: PNG to write; with several images, a number is added to its name.
        prompts: a text file with a prompt per line, instead of one prompt.
        n: images per prompt, with seeds from `seed` on.
        seed: of the first image's noise; same seed, same picture.
        steps: of the sampler.
        guidance: classifier-free guidance scale; 1 is none.
        size: WIDTHxHEIGHT in pixels; by default that of most images the model was trained on.
        sampler: euler or heun for rectified flow, ddim for noise prediction.
        checkpoint: a checkpoint of `lidit fit`, a run's folder (its newest one), a folder of `lidit export`, or the
            bundled model.
        ema: take a checkpoint's averaged weights.
        dtype: precision of backbone and prompt encoder; auto: on a GPU that of the training, on a CPU float32.
        device: auto (a GPU if there is one), cpu, cuda, or cuda:N.
        trust: modules besides lidit whose classes the checkpoint may name, such as `--trust mine`.
    """
    texts = read_prompts(prompt, prompts)
    if n < 1:
        raise ValueError(f"--n is {n}: draw at least one image per prompt")
    if not 0 <= seed < 2**63 - n:
        raise ValueError(f"--seed is {seed}: take a number from 0 to 2^63")
    if Path(out).is_dir():
        raise ValueError(f"--out {out} is a folder; name a file in it, such as {Path(out) / 'out.png'}")
    pairs = [(text, seed + i) for text in texts for i in range(n)]
    asked = parse_size(size) if size else None
    pipeline = Pipeline.load(checkpoint, ema, trust or (), device, dtype)
    width, height = asked or pipeline.size
    images = pipeline(
        [text for text, _ in pairs],
        [s for _, s in pairs],
        (width, height),
        steps=steps,
        guidance=guidance,
        sampler=sampler,
    )
    path = Path(out)
    for i, (image, (text, used)) in enumerate(zip(images, pairs, strict=True)):
        target = path if len(images) == 1 else path.with_name(f"{path.stem}-{i:04d}{path.suffix or '.png'}")
        facts = {"prompt": text, "seed": used, "steps": steps, "guidance": guidance, "size": f"{width}x{height}"}
        facts |= {"sampler": sampler or "default", "dtype": name_of(pipeline.dtype), "checkpoint": checkpoint}
        save_image(image, target, facts)
        print(f"{target}: {text}")


def read_prompts(prompt: str | None, file: str | None) -> list[str]:
    """One prompt, or those of a file, a line each.

    Raises:
        ValueError: neither or both are given, or the file has no prompts or is no text.
        FileNotFoundError: there is no such file.
    """
    if (prompt is None) == (file is None):
        raise ValueError('give either a prompt, as in `lidit sample "a red circle"`, or --prompts FILE')
    if prompt is not None:
        return [prompt]
    if not Path(file).is_file():
        raise FileNotFoundError(f"there is no file of prompts at {file}; write one, a prompt per line")
    try:
        lines = [line.strip() for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no UTF-8 text; write one prompt per line") from None
    if not lines:
        raise ValueError(f"{file} holds no prompts; write one per line")
    return lines


def encode(show: str, llms: list[str] | None = None, max_tokens: int = 256) -> None:
    """Show how each LLM reads a prompt: its tokens, and which of them the transformer gets.

    Args:
        show: the prompt.
        llms: Hugging Face ids or folders; by default the bundled ones.
        max_tokens: longest caption; tokens after it are cut.
    """
    for name in llms or ["bundled:llm_llama", "bundled:llm_qwen"]:
        tokens = FrozenLLM(name, max_tokens=max_tokens).show(show)
        kept = [text for text, keep in tokens if keep]
        print(f"{name}: {len(tokens)} tokens, {len(tokens) - len(kept)} of the instruction cut, {len(kept)} kept")
        print("  cut : " + " ".join(repr(text)[1:-1] for text, keep in tokens if not keep))
        print("  kept: " + " ".join(repr(text)[1:-1] for text in kept))
