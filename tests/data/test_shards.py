"""Shards give back what was written, across files; damage is named."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from armillary.base.errors import ArmillaryError, DataError
from armillary.data.shards import ShardWriter, TokenStore, width_for

DOCUMENTS = st.lists(st.lists(st.integers(0, 65535), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(documents=DOCUMENTS, per_shard=st.integers(1, 5), data=st.data())
def test_stores_read_like_lists(
    make_store: Any, documents: list[list[int]], per_shard: int, data: st.DataObject
) -> None:
    store = make_store(documents, per_shard)
    stream = [id for document in documents for id in document]
    owners = [number for number, document in enumerate(documents) for _ in document]
    assert len(store) == len(documents) and store.tokens == len(stream)
    assert [store.document(i).tolist() for i in range(len(store))] == documents
    assert store.document_bytes.tolist() == [10 * len(document) for document in documents]
    assert store.document_starts.tolist() == [owners.index(i) for i in range(len(documents))]
    start = data.draw(st.integers(0, len(stream)))
    stop = data.draw(st.integers(start, len(stream)))
    assert store.read(start, stop).tolist() == stream[start:stop]
    assert store.documents_of(start, stop).tolist() == owners[start:stop]
    store.verify()


def test_large_vocabularies_take_four_bytes(make_store: Any) -> None:
    assert (width_for(65536), width_for(65537)) == ("uint16", "uint32")
    store = make_store([[70_000, 4_000_000_000]], width="uint32")
    assert store.document(0).tolist() == [70_000, 4_000_000_000]
    assert store.shards[0].tokens_path(store.folder).stat().st_size == 8


def test_places_outside_are_refused(make_store: Any) -> None:
    store = make_store([[1, 2], [3]])
    for ask in (
        lambda: store.document(2),
        lambda: store.document(-1),
        lambda: store.read(0, 4),
        lambda: store.read(2, 1),
    ):
        with pytest.raises(IndexError):
            ask()


def test_documents_are_views_of_the_file(make_store: Any) -> None:
    document = make_store([[1, 2, 3]]).document(0)
    assert not document.flags.writeable and document.base is not None


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_truncated_shards_are_named_at_opening(make_store: Any, ending: str) -> None:
    store = make_store([[1, 2, 3], [4], [5], [6, 7]], per_shard=3)
    path = store.folder / f"train-00-00001.{ending}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="truncated") as caught:
        TokenStore(store.folder, store.shards, "uint16")
    assert caught.value.where == str(path) and "prepare the data again" in str(caught.value)
    path.unlink()
    with pytest.raises(DataError, match="missing") as caught:
        TokenStore(store.folder, store.shards, "uint16")
    assert caught.value.where == str(path)


@pytest.mark.parametrize("ending", ["bin", "idx"])
def test_corrupt_shards_are_named_by_verify(make_store: Any, ending: str) -> None:
    store = make_store([[1, 2, 3], [4], [5], [6, 7]], per_shard=3)
    path = store.folder / f"train-00-00001.{ending}"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    again = TokenStore(store.folder, store.shards, "uint16")
    with pytest.raises(DataError, match="corrupt") as caught:
        again.verify()
    assert caught.value.where == str(path) and "prepare the data again" in str(caught.value)


def test_a_shard_appears_only_when_closed(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "train-00-00000", "uint16")
    writer.add(np.asarray([1, 2]), 2)
    assert not list(tmp_path.glob("*.bin"))
    writer.abandon()
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_one_clear_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ShardWriter(tmp_path, "train-00-00000", "uint16")
    writer.add(np.asarray([1, 2]), 2)

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(ArmillaryError, match="disk is full"):
        writer.close()
    assert not list(tmp_path.glob("*.bin"))
