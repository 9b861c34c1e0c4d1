"""lidit: LLM-infused diffusion transformers, one code path at two scales."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lidit.run import Run

__all__ = ["Run", "__version__"]
__version__ = "0.1.0"  # setup.cfg reads it here; CITATION.cff repeats it


def __getattr__(name: str) -> Any:
    """`lidit.Run`, imported when it is asked for: the command line starts without it."""
    if name == "Run":
        from lidit.run import Run

        return Run
    raise AttributeError(f"module lidit has no attribute {name!r}")
