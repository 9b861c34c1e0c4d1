"""A small set of shards with two image shapes."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.shard import shard

COUNT = 60  # 40 of 64x64 and 20 of 96x64, in four shards


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "shards"
    shard(str(folder), count=COUNT, sizes=("64x64", "64x64", "96x64"), shard_size=16, workers=1)
    return folder
