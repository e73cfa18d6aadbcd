"""Token stores and corpora made for these tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from armillary.data.shards import ShardWriter, TokenStore, Width

MakeStore = Callable[..., TokenStore]


@pytest.fixture
def make_store(tmp_path: Path) -> MakeStore:
    """make_store(documents, per_shard=…): a store of these documents (lists of ids), so many in each shard."""
    made = 0

    def make(
        documents: Sequence[Sequence[int]], per_shard: int = 3, width: Width = "uint16", name: str = "the text"
    ) -> TokenStore:
        nonlocal made
        made += 1
        folder = tmp_path / f"store-{made}"
        folder.mkdir()
        shards = []
        for number, first in enumerate(range(0, len(documents), per_shard)):
            writer = ShardWriter(folder, f"train-00-{number:05d}", width)
            for document in documents[first : first + per_shard]:
                writer.add(np.asarray(document, width), 10 * len(document))
            shards.append(writer.close())
        return TokenStore(folder, shards, width, name=name)

    return make
