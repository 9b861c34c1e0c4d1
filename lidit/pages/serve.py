"""`lidit serve`: a page to try prompts on; one or two models draw from the same noise, and show how they got there."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lidit.devices import Precision
from lidit.pages.listen import address, listening
from lidit.pipeline import BUNDLED, Pipeline
from lidit.pixels import to_uint8

if TYPE_CHECKING:
    import gradio

LONGEST = 2000  # characters of a prompt
MOST_STEPS = 100
STRIP = 8  # pictures on the way
STYLE = """
.tokens {line-height: 2}
.tokens span {padding: .15rem .3rem; border-radius: .3rem; margin: 0 .1rem; font-family: monospace}
.tokens .kept {background: #cfe8cf; color: #123} .tokens .cut {color: #767676}
.drawn img {image-rendering: pixelated; width: 100%; object-fit: contain}
"""
AUTOMATIC = "the model's own"
Filled = int | float | None  # what a field of the page for a number gives


@dataclass(frozen=True)
class Drawn:
    """One model's picture (h w 3), uint8, and a strip (h n*w 3) of what it would have been on the way."""

    image: np.ndarray
    strip: np.ndarray


class Studio:
    """What the page does, without the page.

    Args:
        checkpoints: what draws, each as for `Pipeline.load`.
        longest_side: of a picture, in pixels.
        trust: modules besides lidit whose classes the checkpoints may name.
        device: as for `Pipeline.load`.
        dtype: as for `Pipeline.load`.
    """

    def __init__(
        self,
        checkpoints: list[str],
        longest_side: int,
        trust: Sequence[str] | str = (),
        device: str = "auto",
        dtype: Precision = "auto",
    ):
        names = dict.fromkeys(checkpoints)
        self.pipelines = {name: Pipeline.load(name, True, trust, device, dtype) for name in names}
        self.longest_side = longest_side
        self.titles = dict(zip(self.pipelines, ends(list(self.pipelines)), strict=True))

    @property
    def size(self) -> tuple[int, int]:
        """Width and height that the page begins with: the first model's, or one that fits where none is recorded."""
        first = self._all[0]
        step = first.model.vae.factor * first.model.backbone.patch
        width, height = first.size if first.sizes else (4 * step, 4 * step)
        return min(width, self.longest_side), min(height, self.longest_side)

    def check(self, prompt: str, width: int, height: int) -> None:
        """Refuse what is not to be drawn.

        Raises:
            ValueError: the prompt is empty or too long, or the picture too large.
        """
        if not prompt.strip():
            raise ValueError("Write what to draw, such as: a red circle to the left of a blue square")
        if len(prompt) > LONGEST:
            raise ValueError(f"The prompt has {len(prompt)} characters; write at most {LONGEST}")
        if max(width, height) > self.longest_side:
            raise ValueError(f"{width}x{height} is too large; no side may be above {self.longest_side} pixels")

    def draw(
        self, prompt: str, seed: int, steps: int, guidance: float, sampler: str | None, width: int, height: int
    ) -> list[Drawn]:
        """Each model's picture, from the same noise where their latents are alike.

        Raises:
            ValueError: as `check`; the size does not divide by what the model needs; another model's sampler; a seed
                or a number of steps that there is not.
        """
        self.check(prompt, width, height)
        if not 0 <= seed < 2**63:
            raise ValueError(f"Take a seed from 0 to 2^63, not {seed}")
        if not 1 <= steps <= MOST_STEPS:
            raise ValueError(f"Take 1 to {MOST_STEPS} steps, not {steps}")
        return [self._draw(pipeline, prompt, seed, steps, guidance, sampler, width, height) for pipeline in self._all]

    @property
    def _all(self) -> list[Pipeline]:
        return list(self.pipelines.values())

    @torch.no_grad()
    def _draw(
        self,
        pipeline: Pipeline,
        prompt: str,
        seed: int,
        steps: int,
        guidance: float,
        sampler: str | None,
        width: int,
        height: int,
    ) -> Drawn:
        seen: list[torch.Tensor] = []
        noise = pipeline.noise([seed], width, height)
        latent = pipeline.latents([prompt], noise, steps, guidance, sampler, watch=seen.append)
        chosen = np.linspace(0, len(seen) - 1, min(STRIP, len(seen))).round().astype(int)
        vae = pipeline.model.vae.load(latent.device)
        *way, image = to_uint8(vae.decode(torch.cat([*(seen[i] for i in chosen), latent])))
        return Drawn(image, np.concatenate(way, 1))

    def tokens(self, prompt: str) -> str:
        """HTML: each LLM's tokens, those that the transformer reads marked, and how many were cut."""
        parts = []
        for name, pipeline in self.pipelines.items():
            for llm in pipeline.model.llms:
                names = [html.escape(each) for each in (Path(llm.name).name, self.titles[name])]
                parts.append(f"<p><b>{names[0]}</b>, for {names[1]}{_cut(llm, prompt)}</p>")
                words = [
                    f'<span class="{"kept" if kept else "cut"}">{html.escape(text.strip()) or "&nbsp;"}</span>'
                    for text, kept in llm.show(prompt)
                ]
                parts.append(f'<div class="tokens">{" ".join(words)}</div>')
        return "".join(parts)


def ends(paths: list[str]) -> list[str]:
    """Of each path as many folders from its end as tell them apart."""
    parts = [Path(path).parts for path in paths]
    cut = (["/".join(each[-depth:]) for each in parts] for depth in range(1, max(map(len, parts))))
    return next((found for found in cut if len(set(found)) == len(found)), paths)


def _cut(llm: Any, prompt: str) -> str:
    lost = llm.prompts.split(prompt).cut
    return f": <b>{lost} tokens too long</b>, the end is cut at {llm.prompts.max_tokens}" if lost else ""


def page(studio: Studio, queue: int) -> gradio.Blocks:
    """The page: prompt and settings, pictures side by side, the way there, and what each LLM sees.

    Args:
        studio: what it shows.
        queue: people that may wait; one more is told to come back.
    """
    import gradio as gr

    def draw(prompt: str, seed: Filled, steps: Filled, guidance: Filled, sampler: str, width: Filled, height: Filled):
        try:
            if None in (seed, steps, guidance, width, height):
                raise ValueError("Fill in seed, steps, guidance, width and height; one of them is empty")
            own = None if sampler == AUTOMATIC else sampler
            drawn = studio.draw(prompt, int(seed), int(steps), float(guidance), own, int(width), int(height))
        except ValueError as error:
            raise gr.Error(str(error), duration=None, print_exception=False) from None
        return [*(part for each in drawn for part in (each.image, each.strip)), studio.tokens(prompt)]

    def picture(label: str, **size: int) -> gr.Image:
        return gr.Image(
            label=label,
            alt_text=label,
            show_label=False,
            buttons=[],
            format="png",
            elem_classes="drawn",
            interactive=False,
            **size,
        )

    with gr.Blocks(title="lidit", analytics_enabled=False) as blocks:
        gr.Markdown("# lidit\nWhat does it draw, and what did it read?")
        prompt = gr.Textbox(label="Prompt", value="a red circle to the left of a blue square", max_lines=4)
        button = gr.Button("Draw", variant="primary")
        with gr.Accordion("Settings", open=False), gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0)
            steps = gr.Slider(1, MOST_STEPS, 25, step=1, label="Steps")
            guidance = gr.Slider(0, 15, 3, step=0.5, label="Guidance; 1 is none")
            sampler = gr.Dropdown([AUTOMATIC, "euler", "heun", "ddim"], value=AUTOMATIC, label="Sampler")
            width = gr.Number(studio.size[0], label="Width, pixels", precision=0, minimum=1)
            height = gr.Number(studio.size[1], label="Height, pixels", precision=0, minimum=1)
        shown = []
        with gr.Row():
            for name in studio.pipelines:
                with gr.Column(min_width=280):
                    gr.Markdown(f"**{studio.titles[name]}**")
                    shown.append(picture("The picture", height=320))
                    gr.Markdown("On the way there:")
                    shown.append(picture("What it would have been at some of the steps"))
        tokens = gr.HTML(label="What each LLM sees; marked is what the transformer reads")
        given = [prompt, seed, steps, guidance, sampler, width, height]
        gr.on([button.click, prompt.submit], draw, given, [*shown, tokens], api_name="draw", concurrency_limit=1)
    return blocks.queue(max_size=queue, api_open=False)  # else requests could pass by the queue


def serve(
    checkpoints: list[str] | None = None,
    host: str = "127.0.0.1",
    port: int = 7860,
    queue: int = 16,
    longest_side: int = 256,
    dtype: Precision = "auto",
    device: str = "auto",
    trust: list[str] | str | None = None,
) -> None:
    """Open a page to try prompts on; stop it with Ctrl-C.

    Args:
        checkpoints: one or two models, as for `lidit sample --checkpoint`; two draw side by side from the same noise.
            By default the bundled one.
        host: address to listen on; 0.0.0.0 lets others in, and there is no password.
        port: to listen on; 0 takes a free one.
        queue: people that may wait for their picture; one more is told to come back.
        longest_side: of a picture, in pixels.
        dtype: precision of backbone and prompt encoder; auto: on a GPU that of the training, on a CPU float32.
        device: auto (a GPU if there is one), cpu, cuda, or cuda:N.
        trust: modules besides lidit whose classes the checkpoints may name, such as `--trust mine`.

    Raises:
        ValueError: Gradio is not installed, there are more than two models, no such device, or the port is taken.
    """
    if find_spec("gradio") is None:
        raise ValueError("lidit serve needs Gradio; install it with `pip install 'lidit[serve]'`")
    names = checkpoints or [BUNDLED]
    if len(names) > 2:
        raise ValueError(f"{len(names)} models do not fit side by side; name one or two")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # it works without a network, and tells nobody
    import gradio as gr

    with listening(host, port) as server:  # what is wrong with it is said before models are loaded
        opened, port = address(server), server.getsockname()[1]
    blocks = page(Studio(names, longest_side, trust or (), device, dtype), queue)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    settings = {"server_name": host, "server_port": port, "share": False, "quiet": True, "prevent_thread_lock": True}
    blocks.launch(**settings, theme=theme, css=STYLE, footer_links=[])
    print(f"{opened} (Ctrl-C stops it)", flush=True)
    blocks.block_thread()
