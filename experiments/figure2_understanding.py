"""Figure 2: understanding is not enough: decoder-only LLMs understand more than T5 and align worse, until infused.

    lidit table experiments/figure2_understanding.py run

Cost: mini, 6 runs a seed, all shared with Tables 2, 3 and 6; paper, 9 x 300k steps of batch 256 at 256 px.

Ours deviates: the miniature's measure of understanding is a held-out question set about scene language
(`experiments/scene_questions.py`: four descriptions of a caption, chance 25 %), where the paper's is MMLU. At paper
scale the x axis is not measured: the models' MMLU is published. The row of plain Qwen1.5-7B is ours. The figure's
numbers are not printed in the paper, so only its order is compared. The miniature's own deviations are those of
`experiments/setting.py`.
"""

from experiments.setting import FIT, SETTING, T2I_AVERAGE, row

ROWS = {
    "LLaMA-7B": row("llama_1"),
    "LLaMA2-7B": row("llama_2"),
    "LLaMA3-8B": row("llama_base"),
    "Qwen1.5-7B": row("qwen_base"),
    "T5-XL": row("t5"),
    "T5-XXL": row("t5_xxl"),
    "infused LLaMA3-8B": row("llama", instruction=True, refiner=2),
    "infused Qwen1.5-7B": row("qwen", instruction=True, refiner=2),
    "infused, both": row("llama", "qwen", instruction=True, refiner=2, fusion="collaborative"),
}
UNDERSTANDING, ALIGNMENT = "scene questions", "T2I-CompBench"
COLUMNS = {UNDERSTANDING: {"mini": ("scene-questions", "accuracy", 100)}, ALIGNMENT: T2I_AVERAGE} | FIT
SHOWN = {
    "mini": """No LLM of a million parameters answers the questions above chance (25 %): they model the language's
    grammar (perplexity 1.96 a token) and do not yet copy an attribute from the caption into its description. So the
    figure's x axis says nothing in miniature; it needs larger LLMs, or LLMs that were trained longer."""
}
CLAIMS = [
    ("LLaMA3-8B", "T5-XL", UNDERSTANDING),
    ("T5-XL", "LLaMA3-8B", ALIGNMENT),
    ("infused LLaMA3-8B", "LLaMA3-8B", ALIGNMENT),
    ("infused LLaMA3-8B", "T5-XL", ALIGNMENT),
    ("infused, both", "infused LLaMA3-8B", ALIGNMENT),
]
PLOT = "scatter"
