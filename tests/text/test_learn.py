"""Vocabularies learned from text: the size that was asked, the same every time, every byte in it."""

from __future__ import annotations

import random

import pytest

from armillary.base.errors import TokenizerError
from armillary.text.learn import learn
from armillary.text.pieces import byte_letters

SPECIAL = ["<|end|>", "<|pad|>"]
SMALLEST = 256 + len(SPECIAL)


def _words(seed: int, words: int = 400, texts: int = 30) -> list[str]:
    """Texts in several scripts, with bytes that never stand alone and many words that are equally frequent."""
    pick = random.Random(seed)
    letters = "abcdefghijklmnopqrstuvwxyzéüñабвгдежзийあいうえお日本語"
    known = ["".join(pick.choices(letters, k=pick.randint(2, 8))) for _ in range(words)]
    return [" ".join(pick.choices(known, k=60)) + "\n" for _ in range(texts)]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_texts_give_the_same_vocabulary_in_any_order(kind, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = _words(0)
    first = learn(kind, 600, SPECIAL, texts).to_str()
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")  # read anew by each training
    for again in (texts, texts[::-1]):
        assert learn(kind, 600, SPECIAL, iter(again)).to_str() == first


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("size", [SMALLEST, SMALLEST + 1, 400, 700])
def test_exactly_the_size_that_was_asked(kind, size: int) -> None:
    inner = learn(kind, size, SPECIAL, _words(1))
    vocabulary = inner.get_vocab()
    assert sorted(vocabulary.values()) == list(range(size))
    assert [vocabulary[token] for token in SPECIAL] == [0, 1]
    assert byte_letters().keys() <= vocabulary.keys()


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("texts", [_words(2, 40, 8), ["the cat sat on the mat\n" * 3], ["a"]])
def test_more_than_the_texts_support_names_a_size_that_works(kind, texts: list[str]) -> None:
    with pytest.raises(TokenizerError) as caught:
        learn(kind, 5000, SPECIAL, texts)
    supported = int(str(caught.value.hint).split("tokenizer.size=")[1].split()[0])
    assert f"a vocabulary of {supported}, but tokenizer.size is 5000" in caught.value.what
    for size in {supported, (SMALLEST + supported) // 2}:
        assert learn(kind, size, SPECIAL, texts).get_vocab_size() == size
    with pytest.raises(TokenizerError, match=f"supports a vocabulary of {supported}"):
        learn(kind, supported + 1, SPECIAL, texts)


def test_pieces_that_pruning_lost_are_found_again() -> None:
    """Words that are all equally rare: the library alone gives 669 entries when asked for 700."""
    pick = random.Random(1)
    known = ["".join(pick.choices("abcdefghijklmnopqrstuvwxyz", k=pick.randint(4, 8))) for _ in range(600)]
    texts = [" ".join(pick.sample(known, len(known))) for _ in range(5)]
    for size in (650, 700, 720, 750):
        assert learn("unigram", size, SPECIAL, texts).get_vocab_size() == size


def test_frequent_pairs_are_merged_first() -> None:
    """By hand: "ab" occurs most often, then "abc" (as ab + c), so these are the first two merges."""
    inner = learn("bpe", SMALLEST + 2, SPECIAL, ["ab", "abc", "abc", "ab", "ab"])
    assert inner.encode("ababc").tokens == ["ab", "abc"]


def test_unigram_takes_the_most_likely_segmentation() -> None:
    """The oracle: every segmentation of a word, scored by the sum of its pieces' log-probabilities."""
    import json

    inner = learn("unigram", 400, SPECIAL, _words(3))
    scores = dict(json.loads(inner.to_str())["model"]["vocab"])

    def best(word: str) -> float:
        ways = [0.0]
        for end in range(1, len(word) + 1):
            ways.append(max(ways[at] + scores[word[at:end]] for at in range(end) if word[at:end] in scores))
        return ways[-1]

    for text in _words(4, texts=2):
        for word in text.split():
            tokens = inner.encode(word).tokens
            assert sum(scores[token] for token in tokens) == pytest.approx(best("".join(tokens)), abs=1e-9)


def test_bytes_are_in_order_and_need_no_text() -> None:
    inner = learn("byte", 9999, SPECIAL, [])
    assert inner.get_vocab_size() == SMALLEST
    assert inner.encode("A é\x00").ids == [len(SPECIAL) + byte for byte in "A é\x00".encode()]


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_cannot_be_learned(kind) -> None:
    with pytest.raises(TokenizerError, match=f"tokenizer.size must be at least {SMALLEST}"):
        learn(kind, SMALLEST - 1, SPECIAL, _words(1))
    for nothing in ([], ["", ""]):
        with pytest.raises(TokenizerError, match="no text"):
            learn(kind, SMALLEST, SPECIAL, nothing)
    with pytest.raises(TokenizerError, match="character 3 is half of a surrogate pair"):
        learn(kind, SMALLEST, SPECIAL, ["fine", "bad\ud800"])
    with pytest.raises(TokenizerError, match="expected text, found bytes"):
        learn(kind, SMALLEST, SPECIAL, [b"abc"])  # type: ignore[list-item]


@pytest.mark.parametrize("token", ["think", "'s", " <|a|>", "<|a b|>", "", "###", "<é>", "<\x00>"])
@pytest.mark.parametrize("kind", ["bpe", "byte"])
def test_special_tokens_that_text_could_spell_are_refused(kind, token: str) -> None:
    with pytest.raises(TokenizerError, match="could be mistaken for text"):
        learn(kind, 300, [*SPECIAL, token], _words(1))


def test_progress_counts_bytes_and_long_texts_are_cut() -> None:
    texts = ["héllo\n", "wörld " * 30_000]
    seen: list[int] = []
    learn("bpe", SMALLEST + 5, SPECIAL, texts, seen.append)
    assert seen == [7, 7 + 7 * 30_000]
    # cutting loses nothing: the same as the parts given one by one
    text = "wörld " * 30_000
    whole = learn("bpe", SMALLEST + 6, SPECIAL, [text])
    parts = learn("bpe", SMALLEST + 6, SPECIAL, [text[at : at + 2**16] for at in range(0, len(text), 2**16)])
    assert whole.to_str() == parts.to_str()


def test_a_fault_of_the_texts_is_not_swallowed() -> None:
    def texts():
        yield "one"
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        learn("unigram", 300, SPECIAL, texts())
