"""What ranks noted is read, though one of them came less far."""

from __future__ import annotations

import json
from pathlib import Path

from lidit.rehearsal.witness import losses, notes


def test_a_rank_that_failed_earlier_does_not_hide_what_the_others_noted(tmp_path: Path) -> None:
    for rank, found in enumerate(([1.0, 2.0], [3.0, 4.0, 5.0])):
        lines = [json.dumps({"what": "batch", "step": i, "loss": loss}) for i, loss in enumerate(found)]
        (tmp_path / f"rank-{rank}.jsonl").write_text("\n".join(lines))
    assert [len(rank) for rank in notes(tmp_path)] == [2, 3]
    assert losses(tmp_path) == [2.0, 3.0]
