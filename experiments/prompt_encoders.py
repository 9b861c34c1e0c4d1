"""Ten ways of feeding an LLM to a diffusion transformer, compared on one page: no paper has this table.

    lidit table experiments/prompt_encoders.py run --seeds 3

Cost: mini, 10 runs a seed of some minutes each on two CPU cores; paper, 10 x 300k steps of batch 256 at 256 px.

Ours deviates from the systems that the presets are named after in what docs/prompt_encoders.md says; all read the same
multi-modal LLM, train the same backbone on the same data, and differ in the prompt encoder alone. `once` is 1 where the
text does not depend on the time, so that it can be computed once per prompt; `fall` is the first quarter of a list less
the last. Parameters are the trained ones. In miniature the backbone's norm of the text comes with the bundled
backbone, so that `sana` does not begin at 0.01.
"""

from experiments.setting import FIT, SETTING, row
from lidit.models.variants.presets import PRESETS, settings
from lidit.recipe import path_of


def preset(name: str) -> dict:
    """A row with a preset; its LLM's settings are written out, since a cache of features depends on them."""
    kind, arguments = settings(name).part("llm")
    rows = row("llama", instruction=True, refiner=2)
    llms = {
        scale: [{"class_path": path_of(kind), "init_args": llm | arguments} for llm in given["model.llms"]]
        for scale, given in rows.items()
    }
    fusion = {"model.prompt_encoder.init_args.fusion": "concat"}  # there is one LLM
    return {scale: {"preset": name, "model.llms": llms[scale], **fusion} for scale in rows}


ROWS = {name: preset(name) for name in PRESETS}


def both(mini: tuple[str, str], paper: tuple[str, str] | None, factor: float = 1) -> dict:
    """A column at both scales; the twins' scores are shares."""
    return {"mini": (*mini, 100), "paper": (*paper, factor) if paper else None}


COLUMNS = {
    "attributes": both(("scenes-attributes", "overall"), ("t2i-compbench", "attributes np8"), 100),
    "spatial": both(("scenes-attributes", "spatial"), ("t2i-compbench", "spatial *"), 100),
    "counting": both(("scenes-geneval", "counting"), ("geneval", "counting"), 100),
    "dense": both(("scenes-dense", "overall"), ("dpg-bench", "official average")),
    "fall": both(("scenes-positional-bias", "q1 - q4"), ("positional-bias", "first minus last")),
    **FIT,
    "M parameters": ("record", "parameters", 1e-6),
    "ms per step": ("record", "milliseconds_per_step", 1),
    "once": ("record", "once_per_prompt", 1),
}
CLAIMS = [("li-dit", "plain", "attributes"), ("norm-average", "plain", "attributes")]  # the paper's; arXiv 2506.08210
SHOWN = {
    "mini": """Three seeds. In the mean all that refine lead all that do not: li-dit, kandinsky, krea, lumina, hunyuan
    draw 24 to 26 % of attributes, those without a refiner 18 to 21 %; on held-out fit, the finer measure, the five
    lie at -32.9 to -34.1 against -34.7 to -35.7. Among those that refine, attributes tell nothing apart (the difference
    of two rows has a standard error of 2.3); on held-out fit hunyuan is clearly ahead of li-dit (2.2 standard errors),
    and lumina is with it, which refines once per prompt, without the time: it is not the time in the gates that helps
    here. Of those without a refiner sana fits best, which keeps the instruction in its text, clearly ahead of
    plain; reading several layers without refining is not. That norm-average is ahead of plain in attributes rested on
    its first seed (24.6, then 15.4 and 17.3). Milliseconds were taken on several machines that did other things too;
    only large differences mean something."""
}
