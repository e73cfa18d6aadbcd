"""Streams: whole characters only, the same text as decoding at once, no slower as the text grows."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from armillary.base.errors import TokenizerError
from armillary.text import TokenizerSettings, train_tokenizer

BYTES = train_tokenizer(TokenizerSettings(kind="byte"), [])
FIRST = BYTES.encode("\x00")[0]  # the id of byte 0


@given(
    st.lists(st.integers(0, 255) | st.sampled_from([0x80, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0xED, 0xA0, 0xFF]))
)
def test_any_bytes_stream_as_python_decodes_them(values: list[int]) -> None:
    whole = bytes(values).decode("utf-8", errors="replace")  # the oracle
    ids = [FIRST + value for value in values]
    stream = BYTES.stream()
    assert "".join([stream.push(i) for i in ids]) + stream.finish() == whole == BYTES.decode(ids)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_characters_come_whole_and_at_once(text: str) -> None:
    stream = BYTES.stream()
    for character in text:
        *before, last = [stream.push(i) for i in BYTES.encode(character)]
        assert not any(before) and last == character
    assert stream.finish() == ""


def test_special_tokens_are_left_out_even_inside_a_character() -> None:
    first, second = BYTES.encode("é")
    stream = BYTES.stream()
    ids = [BYTES.special["<|user|>"], first, BYTES.special["<|pad|>"], second]
    assert [stream.push(i) for i in ids] == ["", "", "", "é"]
    assert BYTES.decode(ids) == "é"


def test_a_stream_starts_again_after_finish() -> None:
    stream = BYTES.stream()
    assert stream.push(BYTES.encode("é")[0]) == ""
    assert stream.finish() == "\ufffd"
    assert stream.push(BYTES.encode("a")[0]) == "a" and stream.finish() == ""


@pytest.mark.parametrize("id", [-1, 262, 10**9])
def test_ids_without_a_token(id: int) -> None:
    with pytest.raises(TokenizerError, match=f"id {id} is outside the vocabulary of 262"):
        BYTES.stream().push(id)


def test_a_push_takes_no_longer_late_in_a_text() -> None:
    stream, ids = BYTES.stream(), BYTES.encode("é" * 500)

    def once() -> float:
        start = time.perf_counter()
        for i in ids:
            stream.push(i)
        return time.perf_counter() - start

    early = min(once() for _ in range(5))
    for _ in range(100):
        once()
    assert min(once() for _ in range(5)) < 5 * early  # 100 times the text before it
