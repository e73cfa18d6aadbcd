"""A corpus is the same bytes however it came about, is reused, resumed and never mixed; faults are named."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from armillary.base.errors import DataError, TokenizerError
from armillary.data import prepare as prepare_module
from armillary.data.corpus import Corpus
from armillary.data.prepare import prepare
from armillary.data.settings import DataSettings, SourceSettings
from armillary.data.workers import Encoder
from armillary.text.tokenizer import Tokenizer, TokenizerSettings, train_tokenizer

SRC = Path(prepare_module.__file__).parents[2]
BYTES = TokenizerSettings(kind="byte")
WORDS = ["the", "of", "and", "to", "in", "is", "a", "that", "for", "it", "as", "was", "with", "be", "by", "not", "he"]


def sentence(seed: int, words: int) -> str:
    picks = np.random.default_rng(seed).integers(0, len(WORDS), words)
    return " ".join(WORDS[i] for i in picks) + f" €{seed}.\n"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """200 small files in three folders."""
    root = tmp_path / "texts"
    for number in range(200):
        path = root / "abc"[number % 3] / f"{number:03d}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(sentence(number, 20 + number % 60))
    return root


def settings_for(root: Path, **changes: Any) -> DataSettings:
    return DataSettings(**({"sources": (SourceSettings(path=str(root)),), "heldout": 0.1} | changes))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != ".lock"}


def decoded(corpus: Corpus, store: Any) -> list[str]:
    return [corpus.tokenizer.decode(store.document(i).tolist()) for i in range(len(store))]


# -- what a corpus holds


def test_every_text_comes_back_on_the_side_that_its_hash_says(texts: Path, tmp_path: Path) -> None:
    told: list[tuple[str, float]] = []
    settings = settings_for(texts, shard_tokens=8000)
    corpus = prepare(settings, BYTES, tmp_path / "out", progress=lambda *step: told.append(step))
    files = [path.read_text() for path in sorted(texts.rglob("*.txt"))]

    def held(text: str) -> bool:  # the definition, written a second time
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.1 * 2**64

    assert decoded(corpus, corpus.train) == [text for text in files if not held(text)]
    assert decoded(corpus, corpus.heldout) == [text for text in files if held(text)]
    assert 8 <= len(corpus.heldout) <= 35  # 20 expected
    sizes = [len(text.encode()) for text in files if not held(text)]
    assert corpus.train.document_bytes.tolist() == sizes
    assert all(corpus.train.document(i)[0] == corpus.tokenizer.eos for i in range(len(corpus.train)))
    # byte tokens: one per byte and the boundary
    assert corpus.train.tokens == sum(sizes) + len(sizes) and len(corpus.train.shards) > 2
    record = corpus.manifest.sources[0]
    assert (record.documents, record.bytes, record.skipped) == (200, sum(len(t.encode()) for t in files), 0)
    corpus.verify()
    for stage in ("reading", "tokenising"):
        fractions = [fraction for name, fraction in told if name == stage]
        assert fractions == sorted(fractions) and fractions[-1] > 0.9
    assert told[-1] == ("ready", 1.0) and all(0 <= fraction <= 1 for _, fraction in told)


def test_equal_documents_fall_on_the_same_side(tmp_path: Path) -> None:
    lines = [json.dumps({"text": sentence(number % 40, 10)}) for number in range(160)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = prepare(settings_for(tmp_path / "a.jsonl", heldout=0.4), BYTES, tmp_path / "out")
    train, heldout = decoded(corpus, corpus.train), decoded(corpus, corpus.heldout)
    assert len(train) + len(heldout) == 160 and not set(train) & set(heldout)
    assert len(train) == 4 * len(set(train)) and len(heldout) == 4 * len(set(heldout))


def test_the_tokenizer_learns_from_the_training_side_alone(tmp_path: Path) -> None:
    """Held-out documents are the only ones with a long word, which would otherwise become one token."""
    documents = [sentence(number, 12) for number in range(300)]
    secret = "zzyzxquuxly" * 2

    def held(text: str) -> bool:
        return int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) < 0.3 * 2**64

    documents = [
        text if not held(text) or not held(marked) else marked for text in documents if (marked := f"{secret} {text}")
    ]
    assert sum(secret in text for text in documents) > 10
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents))
    learnt = TokenizerSettings(kind="bpe", size=330)
    corpus = prepare(settings_for(tmp_path / "a.jsonl", heldout=0.3), learnt, tmp_path / "out")
    assert len(corpus.tokenizer.encode(secret)) > 15
    other = train_tokenizer(learnt, documents)
    assert len(other.encode(secret)) < 8  # what it would have been


def test_the_tokenizers_sample_is_bounded_and_even(texts: Path) -> None:
    settings = settings_for(texts, tokenizer_sample=3000)
    readers = [prepare_module.Reader(source) for source in settings.sources]
    _, sample = prepare_module._first_readings(settings, readers, 1, lambda *_: None, learn=True)
    assert 2000 < sum(map(len, sample)) <= 3000
    files = {path.read_bytes(): path for path in texts.rglob("*.txt")}
    folders = [files[text].parent.name for text in sample]
    assert set(folders) == {"a", "b", "c"} and folders == sorted(folders)  # from all over, in order


def test_sources_stay_apart_and_can_be_held_out_whole(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"text": sentence(1000 + n, 9)}) for n in range(7)))
    sources = (
        SourceSettings(path=str(texts / "a"), weight=3),
        SourceSettings(path=str(texts / "b")),
        SourceSettings(path=str(tmp_path / "test.jsonl"), split="heldout"),
    )
    settings = settings_for(texts, sources=sources, heldout=0.0)
    corpus = prepare(settings, BYTES, tmp_path / "out")
    assert [len(source.train) for source in corpus.sources] == [67, 67, 0]
    assert [len(source.heldout) for source in corpus.sources] == [0, 0, 7]
    assert len(corpus.train) == 134 and len(corpus.heldout) == 7
    loader = corpus.loader(settings, context=16, batch=8, seed=0)
    assert len(loader.stores) == 2 and loader.weights == (3, 1)
    assert [loader.stores[0].tokens, loader.stores[1].tokens] == [s.train.tokens for s in corpus.sources[:2]]
    with pytest.raises(DataError, match="3 sources, the settings 1"):
        corpus.loader(settings_for(texts), context=16, batch=8, seed=0)


def test_a_given_tokenizer_is_used_with_its_own_boundary(texts: Path, tmp_path: Path) -> None:
    given = train_tokenizer(BYTES.derive(special=("<s>",)), [])
    given = Tokenizer(given._inner, given.config | {"bos_token": "<s>"})
    corpus = prepare(settings_for(texts), None, tmp_path / "out", tokenizer=given)
    assert corpus.manifest.boundary == (given.eos, given.bos) and given.eos != given.bos
    assert corpus.heldout.document(0)[:2].tolist() == [given.eos, given.bos]
    assert corpus.manifest.tokenizer == corpus.tokenizer.fingerprint
    bare = Tokenizer(given._inner, {})
    with pytest.raises(TokenizerError, match="end of a document"):
        prepare(settings_for(texts), None, tmp_path / "other", tokenizer=bare)
    with pytest.raises(DataError, match="neither a tokenizer"):
        prepare(settings_for(texts), None, tmp_path / "other")


# -- the same bytes, however they came about


def test_the_number_of_workers_changes_nothing(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "BATCH_BYTES", 1000)  # dozens of batches, answered out of order
    learnt = TokenizerSettings(kind="bpe", size=300)
    one, *others = [
        prepare(settings_for(texts, workers=workers, shard_tokens=4000), learnt, tmp_path / str(workers))
        for workers in (1, 2)
    ]
    for other in others:
        assert content(other.folder) == content(one.folder) and other.fingerprint == one.fingerprint
    assert len(one.train.shards) > 1


KILLED = """
import os, signal, sys
from armillary.data import prepare as module
from armillary.data.settings import DataSettings
from armillary.base.settings import parse
from armillary.text.tokenizer import TokenizerSettings
import json
moment, settings, out = int(sys.argv[2]), parse(DataSettings, json.loads(sys.argv[1])), sys.argv[3]
module.BATCH_BYTES = 1000
count = 0
def strike(*_):
    global count
    count += 1
    if count == moment:
        os.kill(os.getpid(), signal.SIGKILL)
for owner, name in ((module.os, "fsync"), (module.os, "replace")):
    def around(real):
        def call(*arguments):
            strike()
            return real(*arguments)
        return call
    setattr(owner, name, around(getattr(owner, name)))
module.prepare(settings, TokenizerSettings(kind="byte"), out)
"""


def test_killed_at_any_moment_it_goes_on_and_gives_the_same_bytes(texts: Path, tmp_path: Path) -> None:
    """The process strikes itself with SIGKILL at its n-th flush or rename, again and again."""
    settings = settings_for(texts, shard_tokens=3000, workers=1)
    whole = prepare(settings, BYTES, tmp_path / "whole")
    out = tmp_path / "out"
    for moment, workers in ((3, 1), (14, 1), (17, 1), (20, 2)):  # in the tokenizer's files, then inside of shards
        asked = settings.derive(workers=workers).to_data()
        command = [sys.executable, "-c", KILLED, json.dumps(asked), str(moment), str(out)]
        # its workers hold the same pipes: this returns only when they have gone too
        done = subprocess.run(
            command, env=os.environ | {"PYTHONPATH": str(SRC)}, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not (out / "manifest.json").exists()
    lines = (out / "progress.jsonl").read_text().splitlines()
    kept = [json.loads(line)["shard"]["name"] + ".bin" for line in lines[1:]]
    assert 0 < len(kept) < len(list((tmp_path / "whole").glob("*.bin")))
    ages = {name: (out / name).stat().st_mtime_ns for name in kept}
    corpus = prepare(settings, BYTES, out)
    assert content(out) == content(tmp_path / "whole") and corpus.fingerprint == whole.fingerprint
    assert {name: (out / name).stat().st_mtime_ns for name in kept} == ages  # none was written again


def test_what_was_damaged_while_it_lay_unfinished_is_done_again(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(texts, shard_tokens=5000)
    prepare(settings, BYTES, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "Manifest", lambda **_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(settings, BYTES, tmp_path / "out")
    out = tmp_path / "out"
    shard = out / "train-00-00001.bin"
    age = (out / "train-00-00000.bin").stat().st_mtime_ns
    shard.write_bytes(b"\0" + shard.read_bytes()[1:])
    with open(out / "progress.jsonl", "a") as journal:
        journal.write('{"source": 0, "spl')  # a torn last line
    prepare(settings, BYTES, out)
    assert content(out) == content(tmp_path / "whole")
    assert (out / "train-00-00000.bin").stat().st_mtime_ns == age
    (out / "manifest.json").unlink()
    (out / "progress.jsonl").write_text('{"key": "of something else"}\n')
    (out / "notes.txt").write_text("not ours")
    prepare(settings, BYTES, out)
    assert content(out) == content(tmp_path / "whole") | {"notes.txt": b"not ours"}


# -- reuse, and never mixing


def test_unchanged_inputs_are_reused_at_once(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = settings_for(texts)
    first = prepare(settings, BYTES, tmp_path / "out")
    ages = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(prepare_module, "_first_readings", lambda *_, **__: pytest.fail("read again"))
    monkeypatch.setattr(prepare_module, "_tokenise", lambda *_, **__: pytest.fail("tokenised again"))
    heavier = tuple(source.derive(weight=5.0) for source in settings.sources)
    for same in (settings, settings.derive(workers=2, isolate=True, sources=heavier)):
        again = prepare(same, BYTES, tmp_path / "out")
        assert again.folder == first.folder and again.fingerprint == first.fingerprint
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == ages


@pytest.mark.parametrize("what", ["settings", "tokenizer", "input"])
def test_another_corpus_goes_into_a_folder_of_its_own(texts: Path, tmp_path: Path, what: str) -> None:
    settings, tokenizer = settings_for(texts), BYTES
    first = prepare(settings, tokenizer, tmp_path / "out")
    before = content(first.folder)
    if what == "settings":
        settings = settings.derive(heldout=0.3)
    elif what == "tokenizer":
        tokenizer = tokenizer.derive(special=("<x>",))
    else:
        (texts / "a" / "000.txt").write_text("something new\n")
    second = prepare(settings, tokenizer, tmp_path / "out")
    assert second.folder.parent == first.folder and second.fingerprint != first.fingerprint
    assert content(first.folder) == before
    assert prepare(settings, tokenizer, tmp_path / "out").folder == second.folder
    Corpus.open(first.folder).verify()
    Corpus.open(second.folder).verify()


def test_two_at_a_time_do_the_work_once(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    started, waiting = threading.Event(), threading.Event()
    work = prepare_module._tokenise

    def slow(*arguments: Any) -> Any:
        runs.append(1)
        started.set()
        assert waiting.wait(20)
        return work(*arguments)

    monkeypatch.setattr(prepare_module, "_tokenise", slow)
    results: list[Corpus] = []
    first = threading.Thread(target=lambda: results.append(prepare(settings_for(texts), BYTES, tmp_path / "out")))
    first.start()
    assert started.wait(20)

    def told(stage: str, _: float) -> None:
        if stage.startswith("waiting"):
            waiting.set()

    results.append(prepare(settings_for(texts), BYTES, tmp_path / "out", progress=told))
    first.join(20)
    assert len(runs) == 1 and results[0].fingerprint == results[1].fingerprint


# -- faults


def test_misencoded_files_are_named_and_counted_in_the_manifest(texts: Path, tmp_path: Path) -> None:
    (texts / "b" / "photo.jpg").write_bytes(b"\xff\xd8\0")
    (texts / "c" / "old.txt").write_bytes("déjà vu".encode("latin-1"))
    (texts / "c" / "void.txt").write_text("")
    prepare(settings_for(texts), BYTES, tmp_path / "out")
    record = Corpus.open(tmp_path / "out").manifest.sources[0]
    assert (record.documents, record.skipped, record.empty) == (200, 2, 1)
    assert record.skipped_names == ("b/photo.jpg: binary (it holds NUL bytes)", "c/old.txt: not valid UTF-8")


def test_an_empty_corpus(tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match="no text in the sources"):
        prepare(settings_for(tmp_path / "texts"), BYTES, tmp_path / "out")
    (tmp_path / "texts" / "a.bin").write_bytes(b"\0")
    with pytest.raises(DataError, match="a.bin: binary"):
        prepare(settings_for(tmp_path / "texts"), BYTES, tmp_path / "out")
    with pytest.raises(DataError, match="no sources"):
        prepare(DataSettings(), BYTES, tmp_path / "out")
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match="not a folder"):
        prepare(settings_for(tmp_path / "texts"), BYTES, tmp_path / "file")


@pytest.mark.parametrize("heldout", [0.001, 0.999])
def test_a_few_documents_still_fill_both_sides(tmp_path: Path, heldout: float) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": sentence(n, 5)}) for n in range(5)))
    corpus = prepare(settings_for(tmp_path / "a.jsonl", heldout=heldout), BYTES, tmp_path / "out")
    assert sorted((len(corpus.train), len(corpus.heldout))) == [1, 4]
    assert (len(corpus.heldout) == 1) == (heldout < 0.5)
    given = prepare(
        settings_for(tmp_path / "a.jsonl", heldout=heldout), None, tmp_path / "given", tokenizer=corpus.tokenizer
    )
    assert given.fingerprint == corpus.fingerprint


@pytest.mark.parametrize("heldout", [0.0, 0.02])
def test_one_document_cannot_be_split(tmp_path: Path, heldout: float) -> None:
    (tmp_path / "a.txt").write_text("the only one")
    with pytest.raises(DataError, match="nothing to hold out"):
        prepare(settings_for(tmp_path / "a.txt", heldout=heldout), BYTES, tmp_path / "out")


def test_sources_that_change_while_they_are_read(texts: Path, tmp_path: Path) -> None:
    def meddle(stage: str, _: float) -> None:
        if stage == "tokenising":
            (texts / "a" / "000.txt").write_text("changed in the middle of it all")

    with pytest.raises(DataError, match="changed while"):
        prepare(settings_for(texts), BYTES, tmp_path / "out", progress=meddle)
    assert not (tmp_path / "out" / "manifest.json").exists()
    corpus = prepare(settings_for(texts), BYTES, tmp_path / "out")
    assert "changed in the middle of it all" in decoded(corpus, corpus.train) + decoded(corpus, corpus.heldout)


def test_a_killed_worker_is_one_clear_message(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(BYTES, [])
    tokenizer.save(tmp_path)
    encoder = Encoder(tokenizer, tmp_path, "uint16", 2)
    seen = 0

    def go_on() -> None:
        nonlocal seen
        with encoder:
            for _ in encoder.map((number, [b"some text"] * 10) for number in range(1000)):
                seen += 1
                if seen == 5:
                    os.kill(encoder._workers[0].pid, signal.SIGKILL)

    with pytest.raises(DataError, match="ended by SIGKILL") as caught:
        go_on()
    assert 5 <= seen < 1000 and "run again" in str(caught.value)
    assert all(worker.returncode is not None for worker in encoder._workers)


def test_damaged_and_foreign_manifests(texts: Path, tmp_path: Path) -> None:
    folder = prepare(settings_for(texts), BYTES, tmp_path / "out").folder
    path = folder / "manifest.json"
    good = json.loads(path.read_text())

    def opened(text: str) -> str:
        path.write_text(text)
        with pytest.raises(DataError) as caught:
            Corpus.open(folder)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "damaged" in opened(path.read_text()[:-40])
    assert "not the manifest of a prepared corpus" in opened('{"name": "some web application"}')
    assert "version 99" in opened(json.dumps(good | {"schema_version": 99}))
    assert "unknown key 'extra'" in opened(json.dumps(good | {"extra": 1}))
    outside = json.loads(json.dumps(good).replace("train-00-00000", "../../secret"))
    assert "damaged" in opened(json.dumps(outside))
    path.unlink()
    with pytest.raises(DataError, match="no prepared corpus here"):
        Corpus.open(folder)


def test_a_truncated_shard_and_another_tokenizer_are_found(texts: Path, tmp_path: Path) -> None:
    corpus = prepare(settings_for(texts), BYTES, tmp_path / "out")
    train_tokenizer(BYTES.derive(special=("<x>",)), []).save(corpus.folder)
    with pytest.raises(DataError, match="tokenizer is not the one"):
        Corpus.open(corpus.folder).verify()
    os.truncate(corpus.folder / "heldout-00-00000.bin", 10)
    with pytest.raises(DataError, match="truncated") as caught:
        prepare(settings_for(texts), BYTES, tmp_path / "out")
    assert "heldout-00-00000.bin" in str(caught.value)
    (corpus.folder / "manifest.json").unlink()  # as the hint says
    again = prepare(settings_for(texts), BYTES, tmp_path / "out")
    again.verify()
    assert again.fingerprint == corpus.fingerprint


def test_preparing_does_not_need_torch() -> None:
    code = "import sys, armillary.data.prepare; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(SRC)}).returncode == 0
