"""`lidit plan`: what a recipe costs, counted before anything is read, allocated or submitted.

A tenth of the memory is left to what is not counted: buffers of NCCL and the allocator's gaps.
"""

from __future__ import annotations

from dataclasses import replace

from jsonargparse import ArgumentParser, Namespace

from lidit import fit
from lidit.data.cache import has_features, has_latents
from lidit.models.source import sizes_alone
from lidit.module import TextToImage
from lidit.plan import disk, hours
from lidit.plan.costs import captions, count, planned
from lidit.plan.memory import GB, RECOMPUTE, Plan
from lidit.plan.text import aligned

ROOM = 0.9  # of a GPU's memory that may be filled
ABOVE_ZERO = ("gpu_memory", "disk", "utilisation", "peak", "price", "samples", "tokens")


def main(argv: list[str]) -> None:
    """Print what a recipe costs, and the cheapest switch where it does not fit.

    Raises:
        ArgumentError: the recipe is not understood.
        ValueError: a part of it cannot be counted, or a number makes no sense.
    """
    with sizes_alone() as shipped:
        report(argv, shipped)


def report(argv: list[str], shipped: list[str]) -> None:
    """Print all that is counted of a recipe.

    Args:
        argv: what follows the verb.
        shipped: names of the models whose sizes came from the package; it grows while the recipe is counted.
    """
    given, model = read(argv)
    check(given)
    counts = count(given, model)
    plan = planned(given, model, counts)
    if shipped:
        print(f"No cache has the config.json of {', '.join(shipped)}: their sizes are those that came with lidit")
    tokens = " and ".join(map(str, dict.fromkeys(captions(given, model))))
    print(f"For pictures of {given.pixels} x {given.pixels} and captions of {tokens} tokens")
    print(f"{plan.parameters / 1e6:,.1f}M parameters, {plan.trained / 1e6:,.1f}M of them trained")
    if given.data.cache and not (has_features(given.data.cache) or has_latents(given.data.cache)):
        print("data.cache is not there yet, so the frozen models are counted as loaded")
    print()
    show_operations(plan)
    print()
    show(plan, given.gpus)
    print(verdict(plan, given.gpu_memory * GB))
    print()
    for line in [*hours.lines(given, plan), "", *disk.lines(given, model, plan, counts)]:
        print(line)


def check(given: Namespace) -> None:
    """Refuse numbers that make no sense.

    Raises:
        ValueError: a number is none.
    """
    if min(given.gpus, default=0) < 1:
        raise ValueError(f"--gpus {given.gpus}: name numbers of GPUs to plan for, each at least 1")
    for name in ABOVE_ZERO:
        value = given[name]
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"--{name} {value:g}: it must be above 0")
    if given.utilisation > 1:
        raise ValueError(f"--utilisation {given.utilisation:g}: it is a share of the peak, at most 1")


def read(argv: list[str]) -> tuple[Namespace, TextToImage]:
    """The recipe of a command line with what is asked beside it, and its model, not built."""
    given, model, _ = fit.read_recipe(argv, add_arguments)
    return given, model


def add_arguments(parser: ArgumentParser) -> None:
    """What is asked beside the recipe."""
    parser.add_argument("--gpus", type=list[int], default=[1, 8, 64], help="Numbers of GPUs to plan for.")
    parser.add_argument("--gpu_memory", type=float, default=80.0, help="Of a GPU, in GB.")
    parser.add_argument("--pixels", type=int, default=256, help="Side of a picture.")
    parser.add_argument("--tokens", type=int | None, default=None, help="Of a caption, at most max_tokens.")
    parser.add_argument(
        "--samples",
        type=int | None,
        default=None,
        help="Of the data, for a cache's size; by default as its index says.",
    )
    parser.add_argument("--disk", type=float, default=2.0, help="GB a second that a node writes.")
    parser.add_argument(
        "--peak", type=float, default=hours.PEAK, help="TFLOP/s of a GPU; by default an H100's, dense bfloat16."
    )
    parser.add_argument(
        "--utilisation", type=float, default=hours.UTILISATION, help="Share of the peak that training reaches, 0 to 1."
    )
    parser.add_argument("--price", type=float | None, default=None, help="Of a GPU-hour, in any currency.")


def show_operations(plan: Plan) -> None:
    """Print the operations of an image by part, and of a batch."""
    found = plan.operations() | {"all": plan.flops}
    rows = [[name, f"{flops / 1e12:,.4g}", f"{flops / max(1, plan.flops):.1%}"] for name, flops in found.items()]
    print(aligned([["part", "TFLOP an image", "share"], *rows]))
    print(f"{plan.flops * plan.images / 1e12:,.4g} TFLOP a batch of {plan.images}. Counted are forward and backward")
    print("of what is trained, and forward of LLMs and VAE, 0 where their cache is there. What all captions begin with")
    print("is read once a pass; recomputing is not counted")


def show(plan: Plan, gpus: list[int]) -> None:
    """Print the memory of a GPU in GB for numbers of them, the weights spread over all, then for the recipe itself."""
    spread = [replace(plan, gpus=n, copies=1) for n in gpus]
    again = ["all, recomputing every block"] if 1 in plan.saved else []
    columns = ["GPUs", "images", *plan.memory(), "all", *again]
    rows = []
    for each, name in [*((p, str(p.gpus)) for p in spread), (plan, f"recipe: {plan.gpus}")]:
        memory = [*each.memory().values(), each.total, *(replace(each, every=1).total for _ in again)]
        rows.append([name, str(each.pass_size), *(f"{part / GB:.2f}" for part in memory)])
    print(f"GB of a GPU; the recipe {describe(plan)}")
    print(aligned([columns, *rows]))
    if plan.encoding:
        peak = plan.encoding * plan.pass_size / GB
        print(
            f"The VAE takes {peak:.2f} GB to encode a pass's images, before the pass: `encoding` is what that is more"
        )


def describe(plan: Plan) -> str:
    """How a recipe lays its weights out, and what it recomputes."""
    held = "holds them whole on each GPU" if plan.copies is None else f"spreads {plan.copies} copies over its GPUs"
    recomputed = f"every block in {plan.every}" if plan.every else "nothing"
    return f"{held} and recomputes {recomputed}"


def verdict(plan: Plan, memory: float) -> str:
    """Whether a recipe fits into GPUs of so many bytes, and what costs least time of what would make it fit."""
    budget = f"{ROOM:.0%} of {memory / GB:.0f} GB"
    if plan.total <= ROOM * memory:
        return f"It fits: {plan.total / GB:.1f} GB are within {budget}."
    said = f"It does not fit: {plan.total / GB:.1f} GB are above {budget}"
    switches = enough(plan, ROOM * memory)
    if not switches:
        return f"{said}. Nothing that the plan knows makes it fit; choose a smaller model."
    if len(switches) == 1:
        return f"{said}. The cheapest switch: {switches[0]}."
    return f"{said}, with any one switch. Together: {'; '.join(switches)}."


def enough(plan: Plan, budget: float) -> list[str]:
    """What makes a plan that does not fit fit: one switch, or another after caching and recomputing; none: nothing."""
    taken: list[str] = []
    while True:
        if found := next((switch for switch, other in plan.cheaper() if other.total <= budget), None):
            return [*taken, found]
        if plan.llms:
            taken, plan = [*taken, plan.unread], replace(plan, llms=0, spread=0)
        elif 1 in plan.further:
            taken, plan = [*taken, f"{RECOMPUTE} 1"], replace(plan, every=1)
        else:
            return []
