"""Open folders beyond one family's table: through the native layout, bare bodies, tokenizers in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peers import CONTEXT, GPT2, SIZES, VOCABULARY, greedy, stirred, tokens, transformers, weights
from safetensors.torch import save_file

from armillary.base.settings import parse
from armillary.checkpoints import Loaded, load, load_open, save, save_native, save_open
from armillary.nn.network import ModelSettings, Network, build
from armillary.text import Tokenizer, TokenizerSettings, train_tokenizer

ENDS = {"bos_token_id": 1, "eos_token_id": None}  # so that a greedy continuation never stops early
LLAMA = SIZES | ENDS | {"num_hidden_layers": 2}


def _made(name: str, **changes: Any) -> Any:
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**(GPT2 | ENDS | changes)))
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**(LLAMA | {"tie_word_embeddings": name == "tied"} | changes))
    )


def _same(network: Network, peer: Any) -> None:
    """Logits within 1e-4 and the same 32 greedy tokens."""
    ids = tokens()
    with torch.no_grad():
        assert (network(ids) - peer(ids).logits).abs().max() < 1e-4
        start = ids[:1, :11]
        theirs = peer.generate(start, max_new_tokens=32, do_sample=False, pad_token_id=0)[0, 11:].tolist()
    assert len(theirs) == 32
    greedy(network, network.init_state(1, CONTEXT), start, theirs, close=0)


@pytest.mark.parametrize("name", ["plain", "gpt2"])
def test_through_the_native_layout_and_back(tmp_path: Path, name: str) -> None:
    peer = stirred(_made(name))
    peer.save_pretrained(tmp_path / "theirs")
    loaded = load(tmp_path / "theirs", "cpu")
    save_native(tmp_path / "native", loaded.network, recipe=loaded.recipe)
    _same(load(tmp_path / "native", "cpu").network, peer)


@pytest.mark.parametrize("name, body", [("tied", "model"), ("gpt2", "transformer")])
def test_the_bare_body_of_a_tied_model(tmp_path: Path, name: str, body: str) -> None:
    """Names without the prefix, as the published GPT-2 has them."""
    peer = stirred(_made(name))
    getattr(peer, body).save_pretrained(tmp_path / "theirs")
    assert not any(key.startswith(body) for key in weights(tmp_path / "theirs"))
    _same(load(tmp_path / "theirs", "cpu").network, peer)


@pytest.mark.parametrize("pairing", ["interleaved", "half"])
@pytest.mark.parametrize("scaling", [None, {"kind": "ntk", "factor": 2.0}])
def test_rotary_variants_without_a_key_are_expressed(tmp_path: Path, pairing: str, scaling: Any) -> None:
    """Interleaved pairs by permuting rows, ntk by its base; the same function of the tokens."""
    position = {"kind": "rope", "pairing": pairing, "scaling": scaling}
    mixer = {"kind": "attention", "heads": 6, "kv_heads": 2, "bias": True, "position": position}
    data = {
        "width": 48,
        "depth": 2,
        "vocabulary": VOCABULARY,
        "context": CONTEXT,
        "block": {"mixer": mixer, "channel": "gated"},
    }
    network = build(parse(ModelSettings, data), seed=5)
    for parameter in network.parameters():
        parameter.data += torch.randn_like(parameter) * 0.1
    save_open(tmp_path / "ours", network)
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
    for one in (network, load(tmp_path / "ours", "cpu").network):
        _same(one, peer)


TEXTS = ["Zwölf Boxkämpfer jagen Viktor", "def main() -> None:\n    return 3\n", "日本語 🙂 <|end|>", ""]


@pytest.mark.parametrize("name", ["plain", "gpt2"])
def test_our_tokenizer_in_a_folder_for_others(tmp_path: Path, name: str) -> None:
    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    _made(name, vocab_size=tokenizer.size).save_pretrained(tmp_path / "theirs")
    network = load(tmp_path / "theirs", "cpu").network
    save(tmp_path / "ours", network, tokenizer, layout="open")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    for text in TEXTS:
        ids = tokenizer.encode(text)
        if "<|" not in text:  # they read special tokens typed in a text, we do not
            assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        tokenizer.bos,
        tokenizer.eos,
        tokenizer.pad,
    )
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.chat(messages, generate=False)
    again: Loaded = load(tmp_path / "ours", "cpu")
    assert again.tokenizer is not None and again.tokenizer.fingerprint == tokenizer.fingerprint
    assert again.tokenizer.chat_template == tokenizer.chat_template
    config = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").generation_config
    assert (config.bos_token_id, config.eos_token_id) == (tokenizer.bos, tokenizer.eos)


def test_a_tokenizer_made_elsewhere(tmp_path: Path) -> None:
    from tokenizers import Tokenizer as Theirs
    from tokenizers import decoders, models, pre_tokenizers, trainers

    inner = Theirs(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    inner.train_from_iterator(["some words and some more words " * 9], trainer)
    _made("plain", vocab_size=inner.get_vocab_size() + 5).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>").save_pretrained(tmp_path)
    loaded = load_open(tmp_path, "cpu")
    assert isinstance(loaded.tokenizer, Tokenizer) and loaded.tokenizer.size == inner.get_vocab_size()
    assert loaded.tokenizer.bos == inner.token_to_id("<s>")
    assert loaded.tokenizer.encode("some more words") == inner.encode("some more words").ids


MOE = LLAMA | {"num_local_experts": 3, "sliding_window": None}
QWEN = LLAMA | {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20, "mlp_only_layers": [1]}


@pytest.mark.parametrize("kind, config", [("Mixtral", MOE), ("Qwen3Moe", QWEN)])
def test_experts_stored_as_one_tensor(tmp_path: Path, kind: str, config: dict[str, Any]) -> None:
    """As newer readers hold them, and write when they are told to; ours are the same as from a tensor for each."""
    made = getattr(transformers, f"{kind}Config")(**config)
    peer = getattr(transformers, f"{kind}ForCausalLM")(made).eval()
    peer.save_pretrained(tmp_path / "fused", save_original_format=False)
    peer.save_pretrained(tmp_path / "apart")
    fused, apart = weights(tmp_path / "fused"), weights(tmp_path / "apart")
    assert any(name.endswith(".experts.gate_up_proj") for name in fused) and len(apart) > len(fused)
    network = load(tmp_path / "fused", "cpu").network
    for name, tensor in load(tmp_path / "apart", "cpu").network.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor)
    save_open(tmp_path / "ours", network)
    assert weights(tmp_path / "ours").keys() == apart.keys()


def test_the_older_name_of_an_embedding(tmp_path: Path) -> None:
    """As the first folders of Mamba have it."""
    peer = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=VOCABULARY, hidden_size=24, num_hidden_layers=1, state_size=4)
    ).eval()
    peer.save_pretrained(tmp_path)
    held = weights(tmp_path)
    held["backbone.embedding.weight"] = held.pop("backbone.embeddings.weight")
    save_file(held, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with torch.no_grad():
        assert (load(tmp_path, "cpu").network(tokens()) - peer(tokens()).logits).abs().max() < 1e-4
