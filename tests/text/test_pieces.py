"""Foreign tokenizers: ids, texts and streams as the library and `transformers` have them, bytes exact."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from armillary.base.errors import TokenizerError
from armillary.text import Tokenizer
from armillary.text.pieces import byte_letters

TEXTS = ["the cat sat, on the mat. don't héllo wörld\n" * 3, "  two  spaces  日本語 😀 x9 \t tab"] * 5


def llama() -> tokenizers.Tokenizer:
    """As LLaMA 2: byte fallback, ▁ for spaces, a space put in front that decoding strips."""
    special = ["<unk>", "<s>", "</s>"]
    inner = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    spaced = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    inner.normalizer = normalizers.Sequence(spaced)
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=[*special, *(f"<0x{i:02X}>" for i in range(256))])
    inner.train_from_iterator(["the", "cat", "sat", "on", "the", "mat", ",", "don't"] * 9, trainer)
    layout = json.loads(inner.to_str())
    layout["added_tokens"] = layout["added_tokens"][:3]  # the bytes are ordinary entries
    inner = tokenizers.Tokenizer.from_str(json.dumps(layout))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(steps)
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return inner


def gpt2() -> tokenizers.Tokenizer:
    """As GPT-2: byte letters, one special token, at the end."""
    inner = tokenizers.Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens(["<|endoftext|>"])
    inner.add_tokens(["  "])
    return inner


def t5() -> tokenizers.Tokenizer:
    """As T5: unigram with ▁, special tokens among the pieces, and no piece for "<"."""
    special = ["<pad>", "</s>", "<unk>"]
    pieces = ["▁", "▁the", "the", "▁cat", "s", "/", ">", "at", ".", ",", "▁héllo"]
    entries = [(token, 0.0) for token in special] + [(token, -float(i + 2)) for i, token in enumerate(pieces)]
    inner = tokenizers.Tokenizer(models.Unigram(entries, unk_id=2))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return inner


def bert() -> tokenizers.Tokenizer:
    """As BERT: WordPiece, ## for what continues a word, lower case."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, "the", "cat", "sat", "##s", "mat", ",", ".", "don", "'", "t", "n't", "[", "]"]
    inner = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.normalizer, inner.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(special)
    return inner


def words() -> tokenizers.Tokenizer:
    """Whole words and no decoder: the library joins them with spaces. One special token is a word."""
    known = ["[UNK]", "[PAD]", "the", "cat", "sat"]
    inner = tokenizers.Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["[PAD]", "[UNK]"])
    return inner


def suffixed() -> tokenizers.Tokenizer:
    """As GPT-1: </w> ends a word, and the last one is dropped, so no token has a text of its own."""
    vocabulary = {token: i for i, token in enumerate(["a", "b", "a</w>", "b</w>"])}
    inner = tokenizers.Tokenizer(models.BPE(vocabulary, [], end_of_word_suffix="</w>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder()
    return inner


KINDS: list[Callable[[], tokenizers.Tokenizer]] = [llama, gpt2, t5, bert, words, suffixed]
MADE = {make.__name__: (make(), Tokenizer(make(), {})) for make in KINDS}
# What the library decodes otherwise: the bytes of broken UTF-8, each by itself.
SAME_AS_LIBRARY = {name: [i for i in range(ours.size)] for name, (_, ours) in MADE.items()}
SAME_AS_LIBRARY["llama"] = [i for i in range(MADE["llama"][1].size) if not 128 <= i - 3 < 256]


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60)
@given(data=st.data())
def test_decoding_equals_the_library(name: str, data: st.DataObject) -> None:
    theirs, ours = MADE[name]
    ids = data.draw(st.lists(st.sampled_from(SAME_AS_LIBRARY[name]), max_size=12))
    assert ours.decode(ids) == theirs.decode(ids)
    assert ours.decode(ids, special=True) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", MADE)
@settings(max_examples=60)
@given(data=st.data())
def test_streams_join_to_decode(name: str, data: st.DataObject) -> None:
    _, ours = MADE[name]
    ids = data.draw(st.lists(st.integers(0, ours.size - 1), max_size=12))
    stream = ours.stream()
    for _ in range(2):  # after `finish` the decoder is as new
        assert "".join(stream.push(i) for i in ids) + stream.finish() == ours.decode(ids)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
@pytest.mark.parametrize("text", [*TEXTS[:2], " the cat", "", " ", "the cats at"])
def test_encoding_equals_the_library(name: str, text: str) -> None:
    theirs, ours = MADE[name]
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=20).filter(lambda text: "▁" not in text))
def test_byte_vocabularies_bring_any_text_back(name: str, text: str) -> None:
    ours = MADE[name][1]
    ids = ours.encode(text)
    assert ours.decode(ids) == text
    # bytes exact: SentencePiece puts one space in front of a text that is not empty
    written = b"".join(map(ours.token_bytes, ids))
    assert written == ((b" " if name == "llama" and text else b"") + text.encode())


def test_bytes_of_single_tokens() -> None:
    """By the definitions of the formats."""
    theirs, ours = MADE["llama"]
    assert [ours.token_bytes(theirs.token_to_id(t)) for t in ("<0x0A>", "<0xC3>", "▁the")] == [b"\n", b"\xc3", b" the"]
    theirs, ours = MADE["gpt2"]
    names = ("Ġ", "Ã", "<|endoftext|>")
    assert [ours.token_bytes(theirs.token_to_id(t)) for t in names] == [b" ", b"\xc3", b"<|endoftext|>"]
    theirs, ours = MADE["bert"]
    assert [ours.token_bytes(theirs.token_to_id(t)) for t in ("the", "##s", ".")] == [b" the", b"s", b"."]
    with pytest.raises(TokenizerError, match="bytes of its own"):
        MADE["suffixed"][1].token_bytes(0)


def test_added_tokens_and_byte_letters_are_told_apart() -> None:
    """The library reads an added "éa" as the letter of byte 0xE9 and an "a"; "é" alone is that letter."""
    inner = gpt2()
    inner.add_tokens(["éa"])
    ours = Tokenizer(inner)
    assert ours.encode("éa") == [ours.size - 1] and ours.decode([ours.size - 1]) == "éa"
    assert ours.token_bytes(inner.token_to_id("é")) == b"\xe9"
    assert ours.decode(ours.encode("顏")) == "顏"  # begins with that byte


def test_what_a_vocabulary_cannot_write_is_one_clear_error() -> None:
    ours = Tokenizer(tokenizers.Tokenizer(models.Unigram([("a", -1.0)])))
    assert ours.encode("aa") == [0, 0]
    with pytest.raises(TokenizerError, match="cannot write the text"):
        ours.encode("b")


def test_byte_letters_are_the_librarys() -> None:
    assert sorted(byte_letters()) == sorted(pre_tokenizers.ByteLevel.alphabet())
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for character in map(chr, [*range(128), 0xE9, 0x65E5, 0x1F600]):
        letters = split.pre_tokenize_str(character)[0][0]
        assert bytes(byte_letters()[letter] for letter in letters) == character.encode()


@pytest.mark.parametrize(
    ("name", "typed"),
    [("llama", "</s>"), ("gpt2", "<|endoftext|>"), ("t5", "</s>"), ("bert", "[SEP]"), ("words", "[PAD]")],
)
def test_typed_special_tokens_stay_text(name: str, typed: str) -> None:
    theirs, ours = MADE[name]
    control = theirs.token_to_id(typed)
    for text in (f"the {typed} cat", typed, typed * 2, f"the cat{typed}"):
        assert control not in ours.encode(text)
        assert control in ours.encode(text, special=True)
        assert ours.encode(text, special=True) == theirs.encode(text, add_special_tokens=False).ids
    if name in ("llama", "gpt2"):
        assert ours.decode(ours.encode(f"the {typed} cat")) == f"the {typed} cat"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_folders_written_by_transformers(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    if name == "gpt2":
        names = dict.fromkeys(["bos_token", "eos_token", "unk_token"], "<|endoftext|>")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=MADE[name][0], **names)
    theirs.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    theirs.chat_template = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.bos, ours.eos, ours.pad) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.special["<|call|>"] == theirs.convert_tokens_to_ids("<|call|>") == ours.size - 1
    for text in TEXTS[:2]:
        ids = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text) == ids and ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    messages = [{"role": "user", "content": "the cat"}]
    assert ours.chat(messages) == theirs.apply_chat_template(messages, tokenize=False)
    assert ours.encode_chat(messages) == theirs.apply_chat_template(messages, return_dict=False)
    ours.save(tmp_path / "again")
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert again.encode(TEXTS[0]) == theirs.encode(TEXTS[0])
    assert again.chat_template == theirs.chat_template


def _write(folder: Path, inner: tokenizers.Tokenizer, **files: object) -> Path:
    inner.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_names_may_be_strings_or_objects_and_lie_in_either_file(tmp_path: Path) -> None:
    config = {"eos_token": {"content": "</s>", "lstrip": False}, "bos_token": None, "extra_special_tokens": ["▁the"]}
    names = {"bos_token": "<s>", "eos_token": "<unk>", "mask_token": {"content": "<0x00>"}, "pad_token": "[absent]"}
    ours = Tokenizer.load(_write(tmp_path, llama(), tokenizer_config=config, special_tokens_map=names))
    assert (ours.bos, ours.eos, ours.mask, ours.pad, ours.begin) == (1, 2, 3, None, 1)
    the = ours.special["▁the"]
    assert ours.is_special(the) and ours.decode([the]) == "" and ours.decode([the], special=True) == "the"


def test_added_tokens_outside_tokenizer_json(tmp_path: Path) -> None:
    size = MADE["gpt2"][1].size
    added = {"<|im_start|>": size, "<tool>": size + 2}
    declared = {
        str(size + 1): {"content": "<|im_end|>", "special": True},
        str(size): {"content": "<|im_start|>", "special": True},
    }
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": declared}
    ours = Tokenizer.load(_write(tmp_path, gpt2(), tokenizer_config=config, added_tokens=added))
    assert ours.size == size + 3 and ours.eos == size + 1
    assert ours.encode("<|im_start|>x<|im_end|>", special=True)[::2] == [size, size + 1]
    assert ours.encode("<tool>") == [size + 2]  # added, but not special: an ordinary word
    ours.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    again = Tokenizer.load(tmp_path)
    assert (again.fingerprint, again.special, again.eos) == (ours.fingerprint, ours.special, ours.eos)

    config["added_tokens_decoder"] = {str(size + 7): {"content": "<|far|>", "special": True}}
    with pytest.raises(TokenizerError, match=f"'<\\|far\\|>' the id {size + 7}, tokenizer.json {size}"):
        Tokenizer.load(_write(tmp_path, gpt2(), tokenizer_config=config))


def test_nothing_cuts_fills_or_varies_an_encoding(tmp_path: Path) -> None:
    inner = gpt2()
    plain = inner.encode(TEXTS[0]).ids
    inner.enable_truncation(4)
    inner.enable_padding(length=500)
    inner.model.dropout = 0.5
    ours = Tokenizer.load(_write(tmp_path, inner))
    assert ours.encode_batch([TEXTS[0]] * 5) == [plain] * 5
    assert ours.encode(TEXTS[0], special=True) == plain

    entries = [("a", -1.0), ("aa", -2.0), ("aaa", -3.0)]
    sampling = Tokenizer(tokenizers.Tokenizer(models.Unigram(entries, alpha=0.1, nbest_size=64)))
    assert len({tuple(sampling.encode("aaaaaa")) for _ in range(30)}) == 1


def test_a_hole_in_the_vocabulary() -> None:
    inner = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 5}, unk_token="a"))
    ours = Tokenizer(inner)
    assert ours.size == 6 and ours.decode([0, 5]) == "a b"
    for id in (3, -1, 6):
        with pytest.raises(TokenizerError, match=f"id {id} "):
            ours.token_bytes(id)
        with pytest.raises(TokenizerError, match=f"id {id} "):
            ours.decode([5, id])
        with pytest.raises(TokenizerError, match=f"id {id} "):
            ours.stream().push(id)
