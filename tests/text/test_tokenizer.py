"""Tokenizers: exact round trips, nothing smuggled in, clear refusals, foreign files."""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from armillary.base.errors import TokenizerError
from armillary.text import Tokenizer, TokenizerSettings, fertility, train_tokenizer
from armillary.text.tokenizer import STANDARD

TEXTS = [f"def function_{i}(value):\n    return value + {i}  # héllo wörld\n" for i in range(200)]
TOKENIZERS = {
    kind: train_tokenizer(TokenizerSettings(kind=kind, size=280), TEXTS) for kind in ("bpe", "unigram", "byte")
}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from(["<|end|>", "<|mask|>", "<|user|>", "é", "😀", "\x00", " ", "\n", "\r\n", "日本", "́"])
).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(text=ANY_TEXT)
def test_any_text_comes_back(kind: str, text: str) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not set(ids) & set(tokenizer.special.values())
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_streaming_joins_to_decode(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    ids = data.draw(st.lists(st.integers(0, tokenizer.size - 1), max_size=30))
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)
    # The oracle: Python's own decoding of the bytes with everything at once.
    whole = b"".join(tokenizer.token_bytes(i) for i in ids if not tokenizer.is_special(i))
    assert tokenizer.decode(ids) == whole.decode("utf-8", errors="replace")


def test_no_part_of_a_character_is_streamed() -> None:
    tokenizer = TOKENIZERS["byte"]
    stream = tokenizer.stream()
    assert [stream.push(i) for i in tokenizer.encode("é😀")] == ["", "é", "", "", "", "😀"]


def test_special_tokens_only_when_asked() -> None:
    tokenizer = TOKENIZERS["bpe"]
    assert tokenizer.encode("<|end|>", special=True) == [tokenizer.eos]
    assert tokenizer.eos not in tokenizer.encode("<|end|>")
    assert tokenizer.decode([tokenizer.special["<|user|>"], *tokenizer.encode("x")]) == "x"
    assert tokenizer.decode([tokenizer.special["<|user|>"]], special=True) == "<|user|>"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_training_is_deterministic_and_survives_saving(kind: str, tmp_path) -> None:
    again = train_tokenizer(TokenizerSettings(kind=kind, size=280), TEXTS)
    assert again.fingerprint == TOKENIZERS[kind].fingerprint
    again.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.fingerprint == again.fingerprint
    assert (loaded.begin, loaded.eos, loaded.pad, loaded.size) == (again.begin, again.eos, again.pad, again.size)
    assert loaded.begin == again.eos
    assert loaded.encode(TEXTS[3]) == again.encode(TEXTS[3])


def test_sizes() -> None:
    assert TOKENIZERS["bpe"].size == TOKENIZERS["unigram"].size == 280
    assert TOKENIZERS["byte"].size == 262
    words, per_byte = fertility(TOKENIZERS["byte"], ["ab cd"])
    assert (words, per_byte) == (2.5, 1.0)


@pytest.mark.parametrize(
    ("settings_", "texts", "message"),
    [
        (TokenizerSettings(size=100), TEXTS, "at least 262"),
        (TokenizerSettings(size=300), [], "no text"),
        (TokenizerSettings(size=300), ["", ""], "no text"),
        (TokenizerSettings(size=100_000), TEXTS, "tokenizer.size="),
        (TokenizerSettings(size=300), ["a\ud800"], "U\\+D800"),
    ],
)
def test_refusals(settings_: TokenizerSettings, texts: list[str], message: str) -> None:
    with pytest.raises(TokenizerError, match=message):
        train_tokenizer(settings_, texts)


def test_lone_surrogates_are_refused() -> None:
    with pytest.raises(TokenizerError, match="surrogate"):
        TOKENIZERS["bpe"].encode("ok \udc80")


def test_ids_outside_the_vocabulary() -> None:
    with pytest.raises(TokenizerError, match="outside the vocabulary of 262"):
        TOKENIZERS["byte"].decode([5000])


def test_missing_and_broken_files(tmp_path) -> None:
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(TokenizerError, match="not a tokenizer"):
        Tokenizer.load(tmp_path)
    TOKENIZERS["byte"].save(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{]")
    with pytest.raises(TokenizerError, match="not valid JSON"):
        Tokenizer.load(tmp_path)


def test_a_byte_fallback_tokenizer(tmp_path) -> None:
    """The layout of LLaMA 2: ▁ for spaces, <0xNN> for bytes, a prepended space that decoding strips."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{i:02X}>": 3 + i for i in range(256)}
    for token in ("▁", "a", "b", "▁a", "ab", "▁ab"):
        vocab[token] = len(vocab)
    merges = [("▁", "a"), ("a", "b"), ("▁a", "b")]
    inner = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens([AddedToken(t, special=True) for t in ("<unk>", "<s>", "</s>")])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))
    tokenizer = Tokenizer.load(tmp_path)
    assert (tokenizer.bos, tokenizer.eos, tokenizer.begin) == (1, 2, 1)
    for text in ("ab a", "é😀ab"):
        ids = tokenizer.encode(text)
        assert ids == inner.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == inner.decode(ids) == text  # the library's own decoder is the oracle
        stream = tokenizer.stream()
        assert "".join(stream.push(i) for i in ids) + stream.finish() == text
    assert tokenizer.token_bytes(vocab["<0xC3>"]) == b"\xc3"
    with pytest.raises(TokenizerError, match="no chat template"):
        tokenizer.chat([{"role": "user", "content": "x"}])


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=40, deadline=None)
@given(texts=st.lists(ANY_TEXT, max_size=5))
def test_a_batch_is_its_texts_one_by_one(kind: str, texts: list[str]) -> None:
    tokenizer = TOKENIZERS[kind]
    for special in (False, True):
        batch = tokenizer.encode_batch(texts, special=special)
        assert batch == [tokenizer.encode(text, special=special) for text in texts]
        assert [tokenizer.decode(ids, special=special) for ids in batch] == texts


def test_threads_do_not_mix_text_and_control_tokens() -> None:
    tokenizer = TOKENIZERS["bpe"]
    text = "<|user|> x <|end|>"
    expected = {special: tokenizer.encode(text, special=special) for special in (False, True)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            wanted = [number % 2 == 0 for number in range(4000)]
            found = list(pool.map(lambda special: tokenizer.encode(text, special=special), wanted))
    finally:
        sys.setswitchinterval(interval)
    assert found == [expected[special] for special in wanted]


def test_ids_may_be_arrays_but_not_anything() -> None:
    tokenizer = TOKENIZERS["bpe"]
    ids = tokenizer.encode("héllo")
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(iter(ids)) == "héllo"
    assert tokenizer.decode([]) == tokenizer.decode(np.array([], np.int64)) == ""
    for wrong in ([[1, 2]], ["a"], [1.5], np.zeros((1, 2), int), [None]):
        with pytest.raises(TokenizerError, match="flat list of integers"):
            tokenizer.decode(wrong)  # type: ignore[arg-type]
    for wrong in (3, None, b"x", ("a", "b")):
        with pytest.raises(TokenizerError, match="expected text, found"):
            tokenizer.encode(wrong)  # type: ignore[arg-type]


def test_a_copy_in_another_process_is_the_same() -> None:
    tokenizer = TOKENIZERS["unigram"]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert (copy.fingerprint, copy.config, copy.special) == (tokenizer.fingerprint, tokenizer.config, tokenizer.special)
    assert copy.encode("<|end|>") == tokenizer.encode("<|end|>") != [copy.eos]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_transformers_reads_what_is_saved(kind: str, tmp_path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer(TokenizerSettings(kind=kind, size=290, special=("<|tool|>",)), TEXTS)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "def  x\n\té😀 don't <|end|><|tool|> a ,b ."
    ids = tokenizer.encode(text, special=True)
    assert theirs.encode(text, add_special_tokens=False) == ids
    assert theirs.encode(text) == [tokenizer.begin, *ids]
    assert theirs.decode(tokenizer.encode(text)) == text
    assert [theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id, theirs.mask_token_id] == [
        tokenizer.bos, tokenizer.eos, tokenizer.pad, tokenizer.mask,
    ]  # fmt: skip
    theirs.save_pretrained(tmp_path / "again")
    again = Tokenizer.load(tmp_path / "again")
    assert again.encode(text, special=True) == ids
    assert (again.special, again.begin, again.chat_template) == (
        tokenizer.special, tokenizer.begin, tokenizer.chat_template,
    )  # fmt: skip


def test_the_settings_know_the_size_before_training() -> None:
    for settings_ in (TokenizerSettings(kind="byte", special=("<|a|>", "<|end|>")), TokenizerSettings(size=285)):
        assert settings_.vocabulary == train_tokenizer(settings_, TEXTS).size
    assert TokenizerSettings(special=("<|a|>",)).specials == (*STANDARD, "<|a|>")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"\xff", "tokenizer.json: not UTF-8"),
        ("tokenizer_config.json", b"[]", "tokenizer_config.json: expected a JSON object"),
        ("special_tokens_map.json", b"{", "special_tokens_map.json: not valid JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja: not UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path, name: str, content: bytes, message: str) -> None:
    TOKENIZERS["byte"].save(tmp_path)
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TokenizerError, match=message):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="no such file"):
        Tokenizer.from_file(tmp_path / "absent.json")


def test_fertility_of_known_text() -> None:
    """By hand: four bytes and two words, then three bytes (é is two) and one."""
    assert fertility(TOKENIZERS["byte"], ["a bc", "éa"]) == (7 / 3, 1.0)
    assert fertility(TOKENIZERS["byte"], []) == (0, 0)


REMEMBERS = """
import ctypes, random, sys, threading
from armillary.text import TokenizerSettings, train_tokenizer
class Heap(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena a b c mapped d e used free top".split()]
info = ctypes.CDLL(None).mallinfo2
info.restype = Heap
kind, special, words = sys.argv[1], sys.argv[2] == "special", int(sys.argv[3])
size = 270 if kind == "bpe" else 262
tokenizer = train_tokenizer(TokenizerSettings(kind=kind, size=size), ["def f(value): return value + 1"] * 9)
if words: tokenizer.remember(words)
draw = random.Random(1)
texts = [" ".join("".join(draw.choices("abcdefgh", k=200)) for _ in range(100)) for _ in range(10)]
tokenizer.encode("some words", special=special)
def read():
    for text in texts: tokenizer.encode(text, special=special)
    read_all.set()
    rest.wait()  # what a thread remembers is gone with it
rest, before = threading.Event(), info().used + info().mapped
for _ in range(4):
    read_all = threading.Event()
    threading.Thread(target=read, daemon=True).start()
    read_all.wait()
print(info().used + info().mapped - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's account of its heap")
@pytest.mark.parametrize("special", ["plain", "special"])
@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_what_threads_remember_is_bounded(kind: str, special: str) -> None:
    if not hasattr(ctypes.CDLL(None), "mallinfo2"):
        pytest.skip("another C library")

    def taken(words: int) -> int:
        around = {"TOKENIZERS_PARALLELISM": "false", "MALLOC_ARENA_MAX": "1"}
        command = [sys.executable, "-c", REMEMBERS, kind, special, str(words)]
        done = subprocess.run(command, env={**os.environ, **around}, capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert taken(0) > 8 * 2**20  # the control: all of 1,000 words of 200 letters, four times or once
    assert taken(8) < 2**20
