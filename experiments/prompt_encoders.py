"""Ten ways of feeding an LLM to a diffusion transformer, compared on one page: no paper has this table.

    lidit table experiments/prompt_encoders.py run --seeds 3

Cost: mini, 10 runs a seed of some minutes each on two CPU cores; paper, 10 x 300k steps of batch 256 at 256 px.

Ours deviates: docs/prompt_encoders.md says how each preset differs from the system that it is named after. All presets
read the same multi-modal LLM, train the same backbone on the same data, and differ only in the prompt encoder. `once`
is 1 if the text does not depend on the time, so that it can be computed once per prompt; `fall` is the first quarter of
a list minus the last. Parameters are those that are trained. In miniature the backbone's norm of the text comes with
the bundled backbone, so that `sana` does not begin at 0.01.
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
    """A column at both scales; the miniature benchmarks give shares, shown in per cent."""
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
CLAIMS = [("li-dit", "plain", "attributes"), ("norm-average", "plain", "attributes")]  # the paper's, arXiv 2506.08210's
SHOWN = {
    "mini": """Three seeds. On average every preset with a refiner is ahead of every preset without one: li-dit,
    kandinsky, krea, lumina and hunyuan draw 24 to 26 % of attributes, the others 18 to 21 %; on held-out fit, the finer
    measure, these five are at -32.9 to -34.1, the others at -34.7 to -35.7. Among the five, attributes show no
    difference (that of two rows has a standard error of 2.3). On held-out fit hunyuan is clearly ahead of li-dit (2.2
    standard errors), and lumina, which refines once per prompt and without the time, is close to hunyuan: what helps
    here is not the time in the gates. Of the presets without a refiner, sana fits best, which keeps the instruction in
    its text; it is clearly ahead of plain. Reading several layers without refining is not. That norm-average is ahead
    of plain in attributes rests on its first seed (24.6, then 15.4 and 17.3). Milliseconds were measured on several
    machines that did other things too, so that only large differences mean something."""
}
