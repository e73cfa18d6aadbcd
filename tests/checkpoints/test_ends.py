"""Every token that a folder says an answer ends at does end it, here and in the folders that we write.

The answers to be had are those of `transformers`, which made the folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import transformers

import armillary as arm
from armillary.base.errors import CheckpointError
from armillary.cli.main import main
from armillary.engine.drafts import DraftModel
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.text import TokenizerSettings, train_tokenizer

TOKENIZER = train_tokenizer(TokenizerSettings(kind="byte"), [])
COMMON: dict[str, Any] = {
    "vocab_size": TOKENIZER.size + 5,  # rows that no token has, as folders often do
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "bos_token_id": TOKENIZER.bos,
    "eos_token_id": TOKENIZER.eos,
    "pad_token_id": TOKENIZER.pad,
}
KINDS = {"Llama": {}, "Qwen2": {}, "Gemma2": {"head_dim": 8, "tie_word_embeddings": False}, "Phi3": {}}
PROMPT = "Once upon a time"
LENGTH = 24


def _made(folder: Path, kind: str, where: str) -> tuple[Any, list[int], tuple[int, ...]]:
    """A folder whose answers end at a token besides the tokenizer's own: the peer, its prompt, that answer."""
    torch.manual_seed(5)
    config = getattr(transformers, f"{kind}Config")(**COMMON | KINDS[kind])
    peer = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    ids = [TOKENIZER.begin, *TOKENIZER.encode(PROMPT)]
    free = peer.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False, eos_token_id=-1)[0, len(ids) :]
    answer = free.tolist()
    at = next(place for place in range(3, LENGTH) if answer[place] not in answer[:place])
    ends = [TOKENIZER.eos, answer[at], COMMON["vocab_size"] - 1]
    peer.generation_config.eos_token_id = ends
    if where == "config.json":
        peer.config.eos_token_id = ends
    peer.save_pretrained(folder)
    if where == "config.json":
        (folder / "generation_config.json").unlink()
    TOKENIZER.save(folder)
    made = peer.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)[0, len(ids) :].tolist()
    assert made == answer[: at + 1]
    return peer, ids, tuple(answer[:at])


@pytest.mark.parametrize(
    "kind, where", [*((kind, "generation_config.json") for kind in KINDS), ("Llama", "config.json")]
)
def test_an_answer_ends_at_every_end(tmp_path: Path, kind: str, where: str) -> None:
    peer, ids, answer = _made(tmp_path / "theirs", kind, where)
    ends = tuple(peer.generation_config.eos_token_id)
    arm.save(arm.load(tmp_path / "theirs", device="cpu"), tmp_path / "native", layout="native")
    arm.save(arm.load(tmp_path / "native", device="cpu"), tmp_path / "open", layout="open")
    arm.save(arm.load(tmp_path / "open", device="cpu"), tmp_path / "again", layout="native")
    for name in ("theirs", "native", "open", "again"):
        model = arm.load(tmp_path / name, device="cpu")
        assert model.tokenizer.ends == ends
        out = model.generate(PROMPT, max_new_tokens=LENGTH, temperature=0.0)
        assert (tuple(out.ids), out.finish) == (answer, "end")
    stored = json.loads((tmp_path / "open" / "generation_config.json").read_text())
    assert stored["eos_token_id"] == list(ends)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "open")
    assert theirs.generate(torch.tensor([ids]), max_new_tokens=LENGTH, do_sample=False)[0, len(ids) : -1].tolist() == [
        *answer
    ]


def test_ends_in_drafts_beams_and_bounds(tmp_path: Path) -> None:
    peer, ids, answer = _made(tmp_path, "Llama", "generation_config.json")
    model = arm.load(tmp_path, device="cpu")
    engine = model.engine(drafter=DraftModel(model.network, sure=0.0))  # its guesses go on beyond the end
    (given,) = engine.run([Request(tuple(ids), Sampling(max_new_tokens=LENGTH, temperature=0))])
    assert (tuple(one.token for one in given.choices), given.finish) == (answer, "end")
    assert given.accepted > 0

    def beams() -> list[Any]:
        return model.generate(PROMPT, beams=4, returned=4, max_new_tokens=10)

    model.tokenizer.end_at([beams()[0].ids[2], beams()[1].ids[5]])  # two that the search does come to
    options = {"num_beams": 4, "num_return_sequences": 4, "max_new_tokens": 10, "do_sample": False}
    options["eos_token_id"] = list(model.tokenizer.ends)
    theirs = peer.generate(torch.tensor([ids]), **options)[:, len(ids) :].tolist()
    cut = [next((row[:i] for i, id in enumerate(row) if id in model.tokenizer.ends), row) for row in theirs]
    assert [one.ids for one in beams()] == cut
    assert any(one.finish == "end" for one in beams())

    model.tokenizer.end_at(peer.generation_config.eos_token_id)
    least = len(answer) + 4
    longer = model.generate(PROMPT, max_new_tokens=LENGTH, min_new_tokens=least, temperature=0.0)
    theirs = peer.generate(torch.tensor([ids]), max_new_tokens=LENGTH, min_new_tokens=least, do_sample=False)
    row = theirs[0, len(ids) :].tolist()
    assert len(longer.ids) >= least and longer.ids == [id for id in row if id not in model.tokenizer.ends]


def test_a_constrained_answer_may_end_at_each(tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    from armillary.engine.constraints import Grammars

    _made(tmp_path, "Llama", "generation_config.json")
    tokenizer = arm.load(tmp_path, device="cpu").tokenizer
    grammars = Grammars(tokenizer, COMMON["vocab_size"])
    for end in tokenizer.ends:
        constraint = grammars.constraint("regex", "[0-9]{2}")
        for id in tokenizer.encode("42"):
            scores = constraint.apply(torch.zeros(COMMON["vocab_size"]), [])
            assert scores[list(tokenizer.ends)].isinf().all()  # not before it is complete
            constraint.accept(id)
        scores = constraint.apply(torch.zeros(COMMON["vocab_size"]), [])
        assert sorted(scores.isfinite().nonzero()[:, 0].tolist()) == sorted(tokenizer.ends)
        constraint.accept(end)
    grammars.close()


def test_show_names_them(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    _made(tmp_path, "Llama", "generation_config.json")
    ends = arm.load(tmp_path, device="cpu").tokenizer.ends
    monkeypatch.setattr("sys.argv", ["armillary", "show", str(tmp_path)])
    with pytest.raises(SystemExit):
        main()
    said = " ".join(capsys.readouterr().out.split())
    assert "answers end at <|end|>" in said and all(f"({id})" in said for id in ends)
    monkeypatch.setattr("sys.argv", ["armillary", "show", str(tmp_path), "--json"])
    with pytest.raises(SystemExit):
        main()
    assert list(json.loads(capsys.readouterr().out)["end_tokens"]) == [str(id) for id in ends]


def test_what_cannot_be_an_end(tmp_path: Path) -> None:
    """Ids that no row has are never chosen; what is not an id is refused."""
    _made(tmp_path, "Llama", "generation_config.json")
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [-1, 3, 10**6]}))
    assert arm.load(tmp_path, device="cpu").tokenizer.ends == (TOKENIZER.eos, 3)
    for wrong in ("2", [2, None], {"a": 1}, 1.5, True, [[1]]):
        path.write_text(json.dumps({"eos_token_id": wrong}))
        with pytest.raises(CheckpointError, match=r"generation_config\.json: 'eos_token_id' is"):
            arm.load(tmp_path, device="cpu")


def test_what_only_the_tokenizer_says_stays(tmp_path: Path) -> None:
    _made(tmp_path / "theirs", "Llama", "generation_config.json")
    model = arm.load(tmp_path / "theirs", device="cpu")
    arm.save(model, tmp_path / "open", layout="open")
    (tmp_path / "open" / "generation_config.json").unlink()
    config = json.loads((tmp_path / "open" / "config.json").read_text())
    del config["eos_token_id"]
    (tmp_path / "open" / "config.json").write_text(json.dumps(config))
    assert arm.load(tmp_path / "open", device="cpu").tokenizer.ends == model.tokenizer.ends
