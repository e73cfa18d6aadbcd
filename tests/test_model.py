"""The public face: every name of it, on a model of each form."""

from __future__ import annotations

import pytest
import torch

import armillary as arm
from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.engine.generate import Completion, Completions
from armillary.model import Model
from armillary.text import TokenizerSettings, train_tokenizer

TOKENIZER = train_tokenizer(TokenizerSettings(kind="byte"), [])
SHAPE = {"width": 32, "depth": 2, "vocabulary": TOKENIZER.size, "context": 64}
LOOK = {"mixer": {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"}, "channel": "gated"}


@pytest.fixture(scope="module")
def model() -> Model:
    pattern = {"pattern": ["look", "state"], "blocks": {"look": LOOK, "state": {"mixer": "retention"}}}
    return Model(arm.build(SHAPE | pattern, seed=1).network, TOKENIZER).eval()


def test_every_name_of_the_face_is_there() -> None:
    for name in arm.__all__:
        assert getattr(arm, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = arm.nothing


def test_calls_and_chunks_agree(model: Model) -> None:
    ids = torch.randint(0, 256, (2, 11), generator=torch.Generator().manual_seed(0))
    whole = model(ids)
    assert whole.shape == (2, 11, TOKENIZER.size)
    state = model.init_state(batch=2)
    with torch.no_grad():
        parts = [model.extend(part, state) for part in ids.split([1, 6, 4], 1)]
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4)
    assert state.nbytes > 0


def test_generate_takes_text_texts_and_ids(model: Model) -> None:
    one = model.generate("ab", max_new_tokens=5, temperature=0)
    assert isinstance(one, Completion) and len(one.ids) == len(one.logprobs) <= 5
    many = model.generate(["ab", "c"], max_new_tokens=5, temperature=0)
    assert isinstance(many, Completions) and many[0].ids == one.ids and len(many.text) == 2
    ids = torch.tensor([TOKENIZER.begin, *TOKENIZER.encode("ab")])
    assert model.generate(ids, max_new_tokens=5, temperature=0).ids == one.ids
    assert "".join(model.generate("ab", max_new_tokens=5, temperature=0, stream=True)) == one.text
    with pytest.raises(InputError, match="a prompt is text"):
        model.generate([])


def test_chat_goes_through_the_template(model: Model) -> None:
    talk = [{"role": "user", "content": "hi"}]
    direct = model.generate(torch.tensor(TOKENIZER.encode_chat(talk)), max_new_tokens=4, temperature=0)
    assert model.chat(talk, max_new_tokens=4, temperature=0).ids == direct.ids


def test_embed_leaves_padding_out(model: Model) -> None:
    together = model.embed(["a", "a longer text"])
    assert together.shape == (2, 32)
    assert torch.allclose(together[0], model.embed("a"), atol=1e-5)
    last = model.hidden(torch.tensor([[TOKENIZER.begin, *TOKENIZER.encode("a")]]))[0, -1]
    assert torch.allclose(model.embed("a", pool="last"), last, atol=1e-5)
    assert model.embed("a", normalise=True).norm().item() == pytest.approx(1)
    with pytest.raises(InputError, match="mean, first or last"):
        model.embed("a", pool="median")


@pytest.mark.parametrize("kind", ["classification", "iterative"])
def test_classify_by_likelihood_and_by_head(kind: str, model: Model) -> None:
    found = model.classify("x = ", ["1", "2", "3"])
    assert sum(found.values()) == pytest.approx(1)
    with pytest.raises(InputError, match="labels"):
        model.classify("x")
    settings = SHAPE | {"form": "encoder", "head": {"kind": kind, "classes": 2, "labels": ["no", "yes"]}}
    encoder = Model(arm.build(settings).network, TOKENIZER)
    several = encoder.classify(["a", "bcd"])
    assert set(several[0]) == {"no", "yes"}
    assert several[0]["no"] == pytest.approx(encoder.classify("a")["no"], abs=1e-5)


def test_score_sums_to_the_whole(model: Model) -> None:
    ids, logprobs = model.score("hello")
    assert ids == TOKENIZER.encode("hello")
    row = torch.tensor([[TOKENIZER.begin, *ids]])
    expected = torch.log_softmax(model(row)[0, :-1], -1).gather(1, row[0, 1:, None])[:, 0]
    assert logprobs == pytest.approx(expected.tolist(), abs=1e-4)


def test_watch_and_edit(model: Model) -> None:
    ids = torch.tensor([[1, 2, 3, 4]])
    plain = model(ids)
    with model.watch("blocks.*.mixer.weights", "logits") as seen:
        model(ids)
    assert sorted(seen) == ["blocks.0.mixer.weights", "blocks.1.mixer.weights", "logits"]
    weights = seen["blocks.0.mixer.weights"]
    assert weights.shape == (1, 4, 4, 4)
    assert torch.allclose(weights.sum(-1), torch.ones(1, 4, 4), atol=1e-5)
    assert torch.equal(seen["logits"], plain)
    with model.edit("blocks.0.residual.post", lambda x: x * 0):
        changed = model(ids)
    assert not torch.allclose(changed, plain)
    assert torch.equal(model(ids), plain)  # nothing is left behind
    with pytest.raises(InputError, match="no tap matches"), model.watch("blocks.9.mixer.out"):
        pass
    with pytest.raises(InputError, match="returned"), model.edit("embed", lambda x: x[:, :1]):
        model(ids)


def test_watching_generation_sees_every_step(model: Model) -> None:
    with model.watch("norm") as seen:
        done = model.generate("ab", max_new_tokens=4, temperature=0)
    assert len(seen.steps("norm")) >= len(done.ids)


def test_a_compiled_model_still_obeys_edits() -> None:
    model = arm.build(SHAPE | {"block": LOOK})
    ids = torch.tensor([[1, 2, 3, 4]])
    model.network.compile_blocks(backend="aot_eager")
    plain = model(ids)
    with model.edit("blocks.0.mixer.out", lambda x: x * 0):
        assert not torch.allclose(model(ids), plain)


def test_describe_counts_what_is_there(model: Model) -> None:
    found = model.describe(length=64)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    state = model.init_state(batch=1, capacity=64)
    assert found.state_bytes == pytest.approx(state.nbytes, rel=0.02)


def test_mistakes() -> None:
    with pytest.raises(SettingsError, match="vocabulary is not known"):
        arm.build({"width": 32})
    with pytest.raises(SettingsError, match="did you mean 'width'"):
        arm.build({"widht": 32, "vocabulary": 10})
    with pytest.raises(InputError, match="there is no role"):
        arm.mechanisms("mixr")
    with pytest.raises(UnsupportedError, match="no tokenizer"):
        arm.build(SHAPE).generate("x")
    with pytest.raises(UnsupportedError, match="no quantised weights"):
        arm.load("somewhere", quantize="int8")


def test_save_and_load(model: Model, tmp_path) -> None:
    arm.save(model, tmp_path / "saved")
    again = arm.load(tmp_path / "saved")
    ids = torch.tensor([[1, 2, 3]])
    assert torch.equal(again(ids), model(ids))
    assert again.tokenizer.fingerprint == TOKENIZER.fingerprint


def test_room_is_what_the_longest_prompt_leaves(model: Model) -> None:
    """Counted in the tokens that an answer goes on from."""
    text = "ab" * 9
    left = 64 - len([TOKENIZER.begin, *TOKENIZER.encode(text)])
    assert left == 64 - 19
    assert model.room(text) == model.room(["c", text]) == model.room(torch.zeros(2, 19, dtype=torch.int64)) == left
    assert model.room([7] * 19) == left and model.room(torch.zeros(0, 5, dtype=torch.int64)) == 64
    assert model.room(text, 100) == left + 36 and model.room(text * 5) == 64 - 91
    talk = [{"role": "user", "content": text}, {"role": "assistant", "content": "c"}]
    assert model.room(talk) == model.room(TOKENIZER.encode_chat(talk)) < left
    found = model.generate(text, max_new_tokens=left, min_new_tokens=left, temperature=0)
    assert len(found.ids) == left
    with pytest.raises(InputError, match="a prompt is text"):
        model.room([])


def test_room_behind_what_an_encoder_reads() -> None:
    attention = {"kind": "attention", "heads": 2}
    form = {
        "form": "encoder_decoder",
        "encoder": {"depth": 1, "block": {"mixer": attention, "channel": "gated"}},
        "block": {"mixer": attention, "cross": attention, "channel": "gated"},
    }
    made = Model(arm.build(SHAPE | form, seed=1).network, TOKENIZER).eval()
    assert made.room("ab" * 9) == made.room([{"role": "user", "content": "ab" * 9}]) == 63
    assert made.room("ab" * 9, 20) == 19


def test_rooms_named_like_functions_can_be_called() -> None:
    import armillary.compare
    import armillary.evaluate
    import armillary.train

    assert callable(arm.train) and callable(arm.evaluate) and callable(arm.compare)
    with pytest.raises(arm.ArmillaryError, match="there is no recipe"):
        armillary.train(arm.Recipe.load("no-such-recipe"))


def test_neighbours_are_the_nearest_embeddings() -> None:
    """Against cosines of the table, one by one."""
    shape = {"width": 16, "depth": 0, "vocabulary": 300, "norm": None}  # more entries than the tokenizer has
    model = Model(arm.build(shape, seed=1).network, TOKENIZER)
    (given,) = model.tokenizer.encode("k")
    table = model.network.embed.weight.detach()
    ordinary = [i for i in range(model.tokenizer.size) if i not in {given, *model.tokenizer.special.values()}]
    cosine = {i: float(torch.cosine_similarity(table[i], table[given], 0)) for i in ordinary}
    wanted = sorted(ordinary, key=lambda i: -cosine[i])[:3]
    found = model.neighbours("k", 3)
    assert [token for token, _ in found] == [model.tokenizer.decode([i]) for i in wanted]
    assert [value for _, value in found] == pytest.approx([cosine[i] for i in wanted], abs=1e-5)
    assert len(model.neighbours("kind", 10_000)) == len(ordinary) + 1 - len(set("kind"))
    with pytest.raises(InputError, match="need a text"):
        model.neighbours("")
