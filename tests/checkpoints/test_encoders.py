"""Encoders and encoder–decoders against `transformers`, both ways, on tiny random models with asymmetric shapes.

Run with ARMILLARY_MEASURE=1, in one process, it writes what it measured to encoders.json, from which
`python tools/models.py` makes docs/models.md.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peers import (
    TOKENS,
    VOCABULARY,
    Measured,
    Seen,
    greedy,
    in_and_out,
    measuring,
    share,
    stirred,
    tokens,
    transformers,
    weights,
)
from safetensors.torch import save_file

import armillary as arm
from armillary.base.errors import ArmillaryError
from armillary.checkpoints import load, save_open
from armillary.checkpoints.assemble import fill, wanted
from armillary.checkpoints.table import families
from armillary.checkpoints.tensors import stored
from armillary.engine.core import Engine
from armillary.engine.request import Request
from armillary.engine.sampling import Sampling
from armillary.nn.network import Network, build
from armillary.nn.two_stream import two_stream

MEASURED = Path(__file__).with_name("encoders.json")
CONTEXT, CLOSE = 48, 1e-4
FEW = [9, 17, 12]  # tokens of each row, the rest is padding

BERT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 40,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
}
ROBERTA = BERT | {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 40,
    "d_kv": 12,
    "d_ff": 76,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 5,
    "relative_attention_num_buckets": 12,
    "relative_attention_max_distance": 20,
    "eos_token_id": None,
    "pad_token_id": 0,
    "decoder_start_token_id": 3,
}
XLNET: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 40,
    "d_inner": 76,
    "n_layer": 3,
    "n_head": 5,
    "pad_token_id": 0,
}
# By family and variant: the class of `transformers`, and what its config says. "… in bf16": stored in that type.
CASES: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("bert", "masked language model"): ("BertForMaskedLM", BERT),
    ("bert", "with all heads, relu, in bf16"): (
        "BertForPreTraining",
        BERT | {"hidden_act": "relu", "type_vocab_size": 3, "layer_norm_eps": 1e-3},
    ),
    ("bert", "bare body"): ("BertModel", BERT),
    ("roberta", "masked language model"): ("RobertaForMaskedLM", ROBERTA),
    ("roberta", "bare body in bf16"): ("RobertaModel", ROBERTA | {"pad_token_id": 4}),
    ("xlm-roberta", "masked language model"): ("XLMRobertaForMaskedLM", ROBERTA),
    ("t5", "tied, relu"): ("T5ForConditionalGeneration", T5),
    ("t5", "a head of its own, gated, in bf16"): (
        "T5ForConditionalGeneration",
        T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    ),
    ("t5", "tied, not scaled, one block each"): (
        "T5ForConditionalGeneration",
        T5 | {"num_layers": 1, "num_decoder_layers": 1, "tie_word_embeddings": False, "layer_norm_epsilon": 1e-3},
    ),
    ("mt5", "a head of its own"): ("MT5ForConditionalGeneration", T5),
    ("xlnet", "language model"): ("XLNetLMHeadModel", XLNET),
    ("xlnet", "bare body, relu, in bf16"): ("XLNetModel", XLNET | {"ff_activation": "relu", "layer_norm_eps": 1e-3}),
}
OWN = "a head of its own"
UNREAD = ("pooler.", "cls.seq_relationship.")


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    yield from measuring(MEASURED, CASES)


@pytest.mark.parametrize(("family", "variant"), CASES, ids=[f"{family}-{variant}" for family, variant in CASES])
def test_in_and_out_against_transformers(tmp_path: Path, family: str, variant: str, measured: Measured) -> None:
    made, half = _peer(family, variant), variant.endswith("in bf16")
    network, peer, result = in_and_out(tmp_path, family, made, half, type(made).from_pretrained, _differences, _own)
    if network.settings.form == "encoder_decoder":
        result["greedy"], result["close"] = _greedy(network, peer)
    measured.setdefault(family, {})[variant] = result


def test_every_family_was_measured() -> None:
    """encoders.json is of these cases; with parity.json, of one version of transformers and all families there are."""
    files = [json.loads(path.read_text(encoding="utf-8")) for path in (MEASURED, MEASURED.with_name("parity.json"))]
    assert len({one["transformers"] for one in files}) == 1  # docs/models.md names it once
    held, decoders = (one["families"] for one in files)
    assert held.keys() | decoders.keys() == set(families.names()) and not held.keys() & decoders.keys()
    assert [(family, variant) for family, variants in held.items() for variant in variants] == list(CASES)


def _peer(family: str, variant: str) -> Any:
    name, settings = CASES[family, variant]
    kind = getattr(transformers, name)
    none = {"bos_token_id": None, "eos_token_id": None}
    peer = kind(kind.config_class(**(none | settings), attn_implementation="eager"))
    if OWN in variant:
        peer.lm_head.weight = torch.nn.Parameter(peer.lm_head.weight.detach().clone())
        peer.all_tied_weights_keys.pop("lm_head.weight")
    return stirred(peer)


def _own(folder: Path) -> dict[str, torch.Tensor]:
    """Those of a network's own: a body's names whole or bare, without what takes no part in it."""
    bare = {re.sub(r"^(bert|roberta|transformer)\.", "", name): tensor for name, tensor in weights(folder).items()}
    return {name: tensor for name, tensor in bare.items() if not name.startswith(UNREAD)}


def _ids(rows: int, length: int, seed: int = 1) -> torch.Tensor:
    return tokens(rows, length, least=5, seed=seed)


@torch.no_grad()
def _differences(network: Network, peer: Any) -> tuple[float, float]:
    """The largest difference of logits (hidden states of a bare body) and of hidden states, as a share of the
    largest of their layer (if above 1), over the real tokens of padded rows."""
    padding = torch.arange(max(FEW)) < torch.tensor(FEW)[:, None]
    pad = peer.config.pad_token_id or 0
    ids = _ids(len(FEW), max(FEW)).masked_fill(~padding, pad)
    seen, kept = Seen(), padding
    if network.settings.form == "encoder_decoder":
        answers = _ids(len(FEW), 14, seed=2)
        out = network(answers, source=ids, source_padding=padding, taps=seen)
        given = {"input_ids": ids, "attention_mask": padding.long(), "decoder_input_ids": answers}
        theirs = peer(**given, output_hidden_states=True)
        kept = torch.ones_like(answers, dtype=torch.bool)
        hidden = [*theirs.encoder_hidden_states[:-1], *theirs.decoder_hidden_states]
        masks = [padding] * (len(theirs.encoder_hidden_states) - 1) + [kept] * len(theirs.decoder_hidden_states)
    else:
        segments = (_ids(len(FEW), max(FEW), seed=3) % getattr(peer.config, "type_vocab_size", 2)) * padding
        out = network(ids, padding=padding, segments=segments, taps=seen)
        theirs = peer(ids, attention_mask=padding.long(), token_type_ids=segments, output_hidden_states=True)
        hidden, masks = theirs.hidden_states, [padding] * len(theirs.hidden_states)
    assert len(seen.found) == len(hidden)
    apart = share((a[mask], b[mask]) for a, b, mask in zip(seen.found, hidden, masks, strict=True))
    logits = theirs.get("logits", theirs.get("prediction_logits"))
    if logits is None:
        return apart, apart
    return float((out - logits)[kept].abs().max()), apart


def _greedy(network: Network, peer: Any) -> tuple[int, int]:
    source = _ids(1, 11)
    start, *theirs = peer.generate(source, max_new_tokens=TOKENS, do_sample=False)[0].tolist()
    assert start == network.settings.start and len(theirs) == TOKENS
    state = network.init_state(1, TOKENS, source=source)
    return greedy(network, state, torch.tensor([[start]]), theirs, CLOSE)


def test_two_streams() -> None:
    """XLNet's second stream: scores of tokens that were not seen, in the order of a permutation."""
    peer = _peer("xlnet", "language model")
    family = families.get("xlnet")()
    settings = family.settings(peer.config.to_dict() | {"architectures": ["XLNetLMHeadModel"]}, "config.json")
    network = build(settings)
    state = {name: stored(tensor) for name, tensor in peer.state_dict().items()}
    bound = family.bind(settings, wanted(network))
    pairs = (pair for one in bound for pair in one.imported(state).items())
    fill(network, pairs, torch.device("cpu"), None)
    ids, count = _ids(len(FEW), max(FEW)), max(FEW)
    padding = torch.arange(count) < torch.tensor(FEW)[:, None]
    segments = _ids(len(FEW), count, seed=3) % 2
    generator = torch.Generator().manual_seed(4)
    order = torch.stack([torch.randperm(count, generator=generator) for _ in FEW]).argsort(1)
    seen = order[:, :, None] > order[:, None, :]
    seen[:, :, 0] = True  # so that every query sees something
    targets = torch.tensor([[3, 8, 1], [16, 2, 5], [7, 11, 4]])
    mapping = torch.nn.functional.one_hot(targets, count).float()
    with torch.no_grad():
        theirs = peer(
            ids,
            attention_mask=padding.float(),
            token_type_ids=segments,
            perm_mask=(~seen).float(),
            target_mapping=mapping,
            output_hidden_states=True,
        )
        content, query = two_stream(network, ids, seen, targets, padding=padding, segments=segments)
        assert (network.head(query) - theirs.logits).abs().max() < 1e-4
        assert (content - theirs.hidden_states[-2])[padding].abs().max() < 1e-4
        # what a query asks for takes no part in the answer, unless another token has seen it
        alone = torch.zeros(1, count, count, dtype=torch.bool)
        alone[..., :3] = True
        first = two_stream(network, ids[:1], alone, targets[:1, :2])[1]
        changed = ids[:1].clone()
        changed[0, 3] += 1
        assert torch.equal(first, two_stream(network, changed, alone, targets[:1, :2])[1])
        with pytest.raises(ArmillaryError, match="encoder"):
            two_stream(build(settings.derive(form="decoder", block=None, queries=False)), ids, seen, targets)


def test_two_names_of_one_tensor(tmp_path: Path) -> None:
    """An older name beside the newer one is refused, even where a reader would take the last of them."""
    _peer("bert", "bare body").save_pretrained(tmp_path)
    held = weights(tmp_path)
    held["embeddings.LayerNorm.gamma"] = held["embeddings.LayerNorm.weight"] + 1
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArmillaryError, match="two names of one tensor") as caught:
        load(tmp_path, "cpu")
    assert all(f"'embeddings.LayerNorm.{name}'" in str(caught.value) for name in ("gamma", "weight"))


def test_text_to_text(tmp_path: Path) -> None:
    """The encoder reads the text and its end, and the answer starts from the decoder's own token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    names = ["<pad>", "</s>", "<unk>", "<start>", "▁", *(chr(ord("a") + index) for index in range(VOCABULARY - 5))]
    inner = Tokenizer(models.Unigram([(name, -3.0) for name in names], unk_id=2))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    inner.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    peer = _peer("t5", "a head of its own, gated, in bf16")
    peer.save_pretrained(tmp_path)
    fast.save_pretrained(tmp_path)
    model, texts = arm.load(tmp_path, device="cpu"), ["a cab", "feed a big dog in"]
    out = model.generate(texts, max_new_tokens=9, temperature=0.0)
    for text, answer in zip(texts, out, strict=True):
        given = fast(text, return_tensors="pt")["input_ids"]
        start, *theirs = peer.generate(given, max_new_tokens=9, do_sample=False)[0].tolist()
        assert start == 3 and answer.ids == [i for i in theirs if i != 1]
    assert model.generate("feed a big dog in", max_new_tokens=9, temperature=0.0).ids == out[1].ids
    arm.save(model, tmp_path / "ours", layout="open")
    ours = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / "ours")
    assert ours.generation_config.decoder_start_token_id == 3
    for text, answer in zip(texts, out, strict=True):
        given = fast(text, return_tensors="pt")["input_ids"]
        again = ours.generate(given, max_new_tokens=9, do_sample=False)[0, 1:].tolist()
        assert [i for i in again if i != 1] == answer.ids


@pytest.mark.parametrize(("kind", "variant"), [("t5", "tied, relu"), ("mt5", OWN)])
def test_an_exported_folder_says_where_answers_start(tmp_path: Path, kind: str, variant: str) -> None:
    """Without a tokenizer, too, `transformers` goes on from our folder as we do."""
    peer = _peer(kind, variant)
    peer.save_pretrained(tmp_path / "theirs")
    network = load(tmp_path / "theirs", "cpu").network
    save_open(tmp_path / "ours", network, family=kind)
    again = type(peer).from_pretrained(tmp_path / "ours").eval()
    source = torch.randint(5, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(1))
    assert again.generation_config.decoder_start_token_id == peer.config.decoder_start_token_id
    options = {"max_new_tokens": 12, "do_sample": False}
    start, *answer = again.generate(source, **options)[0].tolist()
    assert start == 3 and answer == peer.generate(source, **options)[0, 1:].tolist()
    asked = Request((start,), Sampling(max_new_tokens=12, temperature=0), source=tuple(source[0].tolist()))
    assert [one.token for one in Engine(network.eval(), capacity=16).run([asked])[0].choices] == answer
