"""Beam search against an exhaustive search, and against `transformers` on one imported model."""

from __future__ import annotations

import itertools
import json

import pytest
import torch

from armillary.base.errors import ArmillaryError, InputError, UnsupportedError
from armillary.checkpoints import load
from armillary.engine.beam import Beams, search
from armillary.model import Model
from armillary.nn.network import ModelSettings, build
from armillary.text import TokenizerSettings, train_tokenizer

PROMPT = [1, 4, 2]


def network_of(**settings):
    mixer = {"kind": "attention", "heads": 2, "position": "rope"}
    given = {"width": 16, "depth": 1, "vocabulary": 6, "context": 64, "block": {"mixer": mixer, "channel": "gated"}}
    return build(ModelSettings(**(given | settings)), seed=2).eval()


def exhaustive(network, length: int, end: int, penalty: float, least: int = 0):
    """Every sequence of at most `length` tokens, with its score, the best first."""
    found = []
    for size in range(1, length + 1):
        for ids in itertools.product(range(6), repeat=size):
            if end in ids[:-1] or (ids[-1] != end and size < length) or (ids[-1] == end and size <= least):
                continue
            with torch.no_grad():
                scores = torch.log_softmax(network(torch.tensor([[*PROMPT, *ids]]))[0, len(PROMPT) - 1 : -1], -1)
            total = float(scores.gather(1, torch.tensor(ids)[:, None]).sum())
            found.append((total / size**penalty, tuple(token for token in ids if token != end)))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("penalty, least, stop", [(1.0, 0, False), (0.0, 2, "never"), (2.0, 0, "never")])
@pytest.mark.parametrize("block", [{"mixer": "retention"}, None])
def test_enough_beams_find_what_an_exhaustive_search_finds(penalty, least, stop, block) -> None:
    network = network_of(**({} if block is None else {"block": block}))
    asked = Beams(
        beams=220, returned=5, max_new_tokens=3, min_new_tokens=least, length_penalty=penalty, early_stopping=stop
    )
    found = search(network, PROMPT, asked, ends=[5])
    for one, (score, ids) in zip(found, exhaustive(network, 3, 5, penalty, least)[:5], strict=True):
        assert one.ids == ids
        assert one.score == pytest.approx(score, abs=1e-4)
        assert one.ended == (len(ids) < 3 or len(one.logprobs) < 3)


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A random model of `transformers`, sharpened so that ends come and go, and ours from its folder."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    config = LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=48,
        vocab_size=32,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=7,
        pad_token_id=0,
    )
    peer = LlamaForCausalLM(config).eval()
    folder = tmp_path_factory.mktemp("peer")
    peer.save_pretrained(folder)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "llama"
    return peer, load(folder, dtype="float32").network.eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"early_stopping": True}, {"length_penalty": 2.0, "early_stopping": "never"}, {"length_penalty": -0.5}],
    ids=str,
)
def test_sequences_and_scores_are_those_of_transformers(imported, options) -> None:
    peer, network = imported
    ended = 0
    for number in range(3):
        prompt = [1, 5 + number, 9, 30 - number]
        asked = Beams(beams=4, returned=3, max_new_tokens=10, **options)
        end = search(network, prompt, asked)[0].ids[2 + number]  # one that beams do come to
        found = search(network, prompt, asked, ends=[end])
        theirs = peer.generate(
            torch.tensor([prompt]),
            num_beams=4,
            num_return_sequences=3,
            max_new_tokens=10,
            do_sample=False,
            return_dict_in_generate=True,
            output_scores=True,
            eos_token_id=end,
            **options,
        )
        for one, ids, score in zip(found, theirs.sequences.tolist(), theirs.sequences_scores.tolist(), strict=True):
            new = ids[len(prompt) :]
            new = new[: new.index(end)] if end in new else new
            assert list(one.ids) == new
            assert one.score == pytest.approx(score, abs=1e-4)
            ended += one.ended
    assert 0 < ended < 9, "all or none ended by themselves, so the comparison says little"


def test_a_model_answers_with_beams() -> None:
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    model = Model(network_of(vocabulary=tokenizer.size), tokenizer)
    one = model.generate("ab", beams=1, max_new_tokens=6)
    assert one.ids == model.generate("ab", temperature=0, max_new_tokens=6).ids
    several = model.generate(["ab", "c"], beams=3, returned=2, max_new_tokens=5)
    assert [len(each) for each in several] == [2, 2]
    assert several[0][0].score >= several[0][1].score
    assert model.generate("ab", beams=3, max_new_tokens=5).text == several[0][0].text
    for options, message in (({"temperature": 0.5}, "temperature"), ({"returned": 9}, "returned is 9")):
        with pytest.raises(InputError, match=message):
            model.generate("ab", beams=3, **options)
    with pytest.raises(UnsupportedError, match="streamed"):
        model.generate("ab", beams=3, stream=True)


def test_learned_positions_bound_the_length() -> None:
    network = network_of(context=8, position="learned", block={"mixer": {"kind": "attention", "heads": 2}})
    with pytest.raises(ArmillaryError, match="positions"):
        search(network, PROMPT, Beams(beams=2, max_new_tokens=20))


def test_encoder_decoders_search_with_their_source() -> None:
    attention = {"kind": "attention", "heads": 2}
    network = network_of(
        form="encoder_decoder",
        encoder={"depth": 1, "block": {"mixer": attention, "channel": "gated"}},
        block={"mixer": attention, "cross": attention, "channel": "gated"},
    )
    found = search(network, [1], Beams(beams=40, max_new_tokens=2), source=[3, 4, 2])[0]
    with torch.no_grad():
        best = max(
            float(
                torch.log_softmax(network(torch.tensor([[1, *ids]]), source=torch.tensor([[3, 4, 2]]))[0, :2], -1)
                .gather(1, torch.tensor(ids)[:, None])
                .sum()
            )
            for ids in itertools.product(range(6), repeat=2)
        )
    assert found.score == pytest.approx(best / 2, abs=1e-4)
