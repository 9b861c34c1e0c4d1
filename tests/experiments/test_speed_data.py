from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.speed_data import DECODING, LIDIT, WEBDATASET, ratios, reached, run


def row(loader: str, workers: int, rate: float) -> dict:
    return {"what": "JPEG", "loader": loader, "workers": workers, "samples_per_second": rate}


def test_rates_are_compared_with_decoding_and_with_webdataset_of_as_many_workers() -> None:
    rows = [row(DECODING, 0, 100.0), row(LIDIT, 0, 95.0), row(WEBDATASET, 0, 80.0), row(LIDIT, 1, 60.0)]
    rows.append(row(WEBDATASET, 1, 120.0))
    found = ratios(rows)
    assert found[1] == {"decoding": 0.95, "webdataset": 95 / 80}
    assert found[3] == {"decoding": 0.6, "webdataset": 0.5}
    met = reached(rows, {"seconds": 6.0, "peak_gb": 1.7, "imports_gb": 0.8})
    assert list(met.values()) == [True, False, False, True]


@pytest.mark.slow
def test_everything_is_measured_and_written(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "speed.json"
    small = {"samples": 32, "cached_samples": 32, "batch_size": 4, "repeats": 1, "workers": (0,), "pixels": 64}
    run(str(out), **small, resumed_shards=4, shard_size=40, position=3)
    found = json.loads(out.read_text())
    assert {(r["what"], r["loader"]) for r in found["loading"]} == {
        *(("JPEG", loader) for loader in ("decoding alone", "lidit", "webdataset", "ImageFolder")),
        *(("latents and features", loader) for loader in ("lidit", "webdataset")),
    }
    assert found["resuming"]["samples"] == 160
    assert "| samples | position |" in capsys.readouterr().out
