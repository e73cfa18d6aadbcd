"""Whole networks: every form from a recipe's data, chunks against wholes, ties, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from armillary.base.errors import InputError, SettingsError, UnsupportedError
from armillary.base.settings import parse
from armillary.nn.context import Context
from armillary.nn.mask import Mask
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.taps import Taps

V, T = 23, 13
ATTENTION = {"kind": "attention", "heads": 4, "kv_heads": 2, "position": "rope"}
BLOCK = {"mixer": ATTENTION, "channel": "gated"}
FORMS: dict[str, dict[str, Any]] = {
    "decoder": {"block": BLOCK},
    "mixed": {"blocks": {"r": {"mixer": "retention", "channel": "ffn"}, "a": BLOCK}, "pattern": ["r", "a"]},
    "learned": {"block": {"mixer": "attention", "channel": "ffn"}, "position": "learned", "context": T},
    "prefix": {"block": BLOCK, "form": "prefix"},
    "encoder": {"block": BLOCK, "form": "encoder"},
    "encoder_decoder": {
        "form": "encoder_decoder",
        "block": {"mixer": ATTENTION, "cross": {"kind": "attention"}, "channel": "gated"},
        "encoder": {"depth": 1, "block": BLOCK},
    },
}


def network(form: str = "decoder", **changes: Any) -> Network:
    made = build(parse(ModelSettings, {"width": 16, "depth": 2, "vocabulary": V, **FORMS[form], **changes}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return made


def tokens(rows: int = 3, length: int = T) -> Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


def around(form: str, rows: int = 3) -> dict[str, Any]:
    """What else a call of this form needs."""
    if form == "prefix":
        return {"side": {"prefix": torch.tensor([4, 0, 2])[:rows]}}
    return {"source": tokens(rows, 7)} if form == "encoder_decoder" else {}


# -- chunks and wholes


@pytest.mark.parametrize("form", [form for form in FORMS if form != "encoder"])
def test_chunks_give_the_whole(form: str, agree: Any) -> None:
    model, ids, more = network(form), tokens(), around(form)
    begin = {name: value for name, value in more.items() if name == "source"}
    each = {name: value for name, value in more.items() if name == "side"}
    with torch.no_grad():
        expected = model(ids, **more)
        state = model.init_state(3, **begin)
        pieces = [model.extend(ids[:, a:b], state, **each) for a, b in ((0, 5), (5, 6), (6, 13))]
        agree(torch.cat(pieces, 1), expected)
        assert state.lengths.tolist() == [13] * 3

        state = model.init_state(3, capacity=2, **begin)
        first = model.extend(ids[:, :6], state, lengths=torch.tensor([6, 4, 5]), last=True, **each)
        agree(first[:, 0], torch.stack([expected[0, 5], expected[1, 3], expected[2, 4]]))
        kept = state.snapshot()
        chunk = torch.stack([ids[0, 6:9], ids[1, 4:7], ids[2, 5:8]])
        second = model.extend(chunk, state, lengths=torch.tensor([0, 3, 1]), **each)
        agree(second[1], expected[1, 4:7])
        agree(second[2, 0], expected[2, 5])
        assert state.lengths.tolist() == [6, 7, 6]
        rows = torch.tensor([2, 0, 2])
        chosen = state.select(rows)
        if "side" in each:
            each = {"side": {"prefix": each["side"]["prefix"][rows]}}
        third = model.extend(torch.stack([ids[2, 6:8], ids[0, 6:8], ids[2, 6:8]]), chosen, **each)
        agree(third, torch.stack([expected[2, 6:8], expected[0, 6:8], expected[2, 6:8]]))
        state.restore(kept)
        assert state.lengths.tolist() == [6, 4, 5]
        again = model.extend(chunk, state, lengths=torch.tensor([0, 3, 1]), **({"side": more["side"]} if each else {}))
        assert torch.equal(again[1], second[1])


@pytest.mark.parametrize("form", ["decoder", "mixed", "encoder_decoder"])
def test_states_are_joined(form: str, agree: Any) -> None:
    model, ids, more = network(form), tokens(4), around(form, 4)
    with torch.no_grad():
        expected = model(ids, **more)
        halves = []
        for rows, stop in ((slice(0, 2), 3), (slice(2, 4), 8)):
            halves.append(model.init_state(2, capacity=stop, **{n: v[rows] for n, v in more.items()}))
            model.extend(ids[rows, :stop], halves[-1])
        joined = type(halves[0]).join(halves)
        assert joined.batch == 4 and joined.lengths.tolist() == [3, 3, 8, 8]
        y = model.extend(torch.cat([ids[:2, 3:6], ids[2:, 8:11]]), joined)
        agree(y, torch.cat([expected[:2, 3:6], expected[2:, 8:11]]))
        if form == "encoder_decoder":
            assert joined.memory is not None and joined.memory.hidden.shape[0] == 4
            assert halves[0].select(torch.tensor([1])).memory.hidden.shape[0] == 1  # type: ignore[union-attr]


def test_truncation_cuts_every_block_or_none(agree: Any) -> None:
    model, ids = network("decoder"), tokens()
    with torch.no_grad():
        expected, state = model(ids), model.init_state(3)
        model.extend(ids[:, :10], state)
        state.truncate(torch.tensor([4, 10, 7]))
        assert state.lengths.tolist() == [4, 10, 7]
        chunk = torch.stack([ids[0, 4:6], ids[1, 10:12], ids[2, 7:9]])
        agree(model.extend(chunk, state), torch.stack([expected[0, 4:6], expected[1, 10:12], expected[2, 7:9]]))

        mixed = network("mixed")
        state = mixed.init_state(3)
        mixed.extend(ids[:, :5], state)
        with pytest.raises(UnsupportedError, match="cannot be truncated"):
            state.truncate(torch.tensor([3, 3, 3]))
        assert state.lengths.tolist() == [5] * 3
        agree(mixed.extend(ids[:, 5:], state), mixed(ids)[:, 5:])


def test_truncation_keeps_an_encoders_memory(agree: Any) -> None:
    model, ids, more = network("encoder_decoder"), tokens(), around("encoder_decoder")
    with torch.no_grad():
        state = model.init_state(3, **more)
        model.extend(ids[:, :6], state)
        state.truncate(torch.tensor([2, 2, 2]))
        agree(model.extend(ids[:, 2:], state), model(ids, **more)[:, 2:])


def test_the_state_costs_what_is_declared() -> None:
    for form in ("decoder", "mixed"):
        model = network(form)
        state = model.init_state(1, capacity=T)
        with torch.no_grad():
            model.extend(tokens(1), state)
        assert state.nbytes == model.settings.cost(model.settings.place(), T, 4).state_bytes
        assert network("encoder").settings.cost(model.settings.place(), T, 4).flops > 0


# -- neighbours


@pytest.mark.parametrize("form", ["decoder", "mixed", "learned", "encoder"])
def test_packed_documents_are_as_if_alone(form: str, agree: Any) -> None:
    model, ids = network(form), tokens(1)
    documents = torch.tensor([[4] * 5 + [9] * 8])
    with torch.no_grad():
        y = model(ids, documents=documents)
        agree(y[:, :5], model(ids[:, :5]))
        agree(y[:, 5:], model(ids[:, 5:]))


@pytest.mark.parametrize("form", ["decoder", "mixed", "learned", "prefix", "encoder", "encoder_decoder"])
def test_padding_on_either_side_changes_nothing(form: str, agree: Any) -> None:
    model, ids, more = network(form), tokens(1), around(form, 1)
    noise = torch.full((1, 4), 3)
    with torch.no_grad():
        expected = model(ids[:, :9], **more)
        for given, real in (
            (torch.cat([noise, ids[:, :9]], 1), slice(4, 13)),
            (torch.cat([ids[:, :9], noise], 1), slice(0, 9)),
        ):
            padding = torch.zeros(1, 13, dtype=torch.bool)
            padding[:, real] = True
            agree(model(given, padding=padding, **more)[:, real], expected)
        if form == "encoder_decoder":
            source = torch.cat([more["source"], noise], 1)
            padded = {"source": source, "source_padding": torch.arange(11)[None] < 7}
            agree(model(ids[:, :9], **padded), expected)
            state = model.init_state(1, **padded)
            agree(model.extend(ids[:, :9], state), expected)


def test_a_mask_from_the_objective_reaches_the_mixers(agree: Any) -> None:
    class Own(Mask):
        def rows(self, q: Tensor, k: Tensor) -> Tensor:
            return (q[:, None] == k[None])[None, None]

    model, ids = network("encoder"), tokens(1)
    with torch.no_grad():
        y = model(ids, mask=Own())
        for t in range(T):
            alone = model(ids[:, t : t + 1], positions=torch.tensor([[t]]))
            agree(y[:, t : t + 1], alone)
    with pytest.raises(UnsupportedError, match="cannot take a mask"):
        network("mixed")(ids, mask=Own())


def test_segments_embed_norm_and_scale(agree: Any) -> None:
    """Against the same sum and norm written out."""
    model, ids = (
        network("encoder", segments=2, embed_scale=3.0, embed_norm="layernorm", position="sinusoidal"),
        tokens(),
    )
    segments = (torch.arange(T) > 6).long().expand(3, T)
    taps = Taps(["embed"])
    model(ids, segments=segments, taps=taps)
    assert model.position is not None and model.segment is not None and model.embed_norm is not None
    x = 3.0 * model.embed.weight[ids] + model.position.embed(torch.arange(T)[None]) + model.segment.weight[segments]
    expected = torch.nn.functional.layer_norm(x, (16,), model.embed_norm.weight, model.embed_norm.bias)
    agree(taps.seen["embed"], expected)
    agree(model(ids), model(ids, segments=torch.zeros_like(ids)))


# -- losses


def test_the_loss_needs_no_logits(agree: Any) -> None:
    model, ids, targets = network(head={"kind": "language_model", "softcap": 2.0, "bias": True}), tokens(), tokens()
    weights = torch.rand(3, T)
    h = model.hidden(ids)
    losses = torch.nn.functional.cross_entropy(model(ids).transpose(1, 2), targets, reduction="none")
    agree(model.cross_entropy(h, targets, weights), (losses * weights).sum())
    agree(model.cross_entropy(h, targets), losses.sum())
    agree(model.token_nll(h, targets), losses)
    classifier = network(head="classification")
    with pytest.raises(UnsupportedError, match="no language-model head"):
        classifier.cross_entropy(h, targets)


def test_bf16_activations_keep_float32_masters() -> None:
    model, ids = network().compute(torch.bfloat16), tokens()
    h = model.hidden(ids)
    assert h.dtype == torch.bfloat16
    model.cross_entropy(h, ids).backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert all(p.grad is not None for p in model.parameters())
    assert model.init_state(1).nbytes == network().init_state(1).nbytes // 2


# -- parameters


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("form", ["decoder", "mixed", "learned"])
def test_function_transforms_go_through(form: str, gradients: bool, agree: Any) -> None:
    """vmap over rows is the batch, on the paths with and without gradients."""
    model, ids = network(form), tokens()
    with torch.set_grad_enabled(gradients):
        agree(torch.vmap(lambda row: model(row[None])[0])(ids), model(ids))


@pytest.mark.parametrize("form", FORMS)
def test_a_build_without_storage_has_the_real_shapes(form: str) -> None:
    settings = network(form).settings
    ghost, real = build(settings, device="meta"), build(settings)
    assert {n: p.shape for n, p in ghost.named_parameters()} == {n: p.shape for n, p in real.named_parameters()}
    assert all(p.is_meta for p in ghost.parameters())
    assert ghost.tied_names() == real.tied_names()


def test_a_seed_means_a_network() -> None:
    settings = network("mixed").settings
    torch.manual_seed(1)
    one = build(settings, seed=3).state_dict()
    torch.manual_seed(2)
    two, other = build(settings, seed=3).state_dict(), build(settings, seed=4).state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert not torch.equal(one["embed.weight"], other["embed.weight"])


def test_tied_weights_are_one_tensor_and_stay_so() -> None:
    model = network()
    assert model.head.product.weight is model.embed.weight  # type: ignore[union-attr]
    assert sum(p.numel() for p in model.parameters() if p.shape == (V, 16)) == V * 16
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()})
    model.check_ties()
    model.head.product.weight = torch.nn.Parameter(model.embed.weight.clone())  # type: ignore[union-attr]
    with pytest.raises(AssertionError, match="no longer the embedding's"):
        model.check_ties()
    model.tie()
    model.check_ties()
    untied = network(head={"kind": "language_model", "tied": False})
    untied.check_ties()
    assert untied.tied_names() == {} and "head.product.weight" in dict(untied.named_parameters())


def test_the_tied_weight_learns_from_both_ends() -> None:
    model, ids = network(), tokens()
    grads = []
    for tied in (True, False):
        if not tied:
            model.head.product.weight = torch.nn.Parameter(model.embed.weight.detach().clone())  # type: ignore[union-attr]
        model.zero_grad()
        model.cross_entropy(model.hidden(ids), ids).backward()
        assert model.embed.weight.grad is not None
        grads.append(model.embed.weight.grad.clone())
    grads[1] += model.head.product.weight.grad  # type: ignore[union-attr]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)


# -- what is refused


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m, ids: m(ids.float()), "pass int64 ids of shape [batch, time]"),
        (lambda m, ids: m(ids[0]), "pass int64 ids of shape [batch, time]"),
        (lambda m, ids: m(ids + V), f"the vocabulary has {V} entries"),
        (lambda m, ids: m(ids - V), f"the vocabulary has {V} entries"),
        (lambda m, ids: m(ids, source=ids), "takes no source"),
        (lambda m, ids: m(ids, source_padding=ids > 0), "takes no source"),
        (lambda m, ids: m(ids, segments=ids), "has no segments"),
        (lambda m, ids: m(ids, side={"prefix": ids}), "no mechanism here needs the side tensor 'prefix'"),
        (lambda m, ids: m.extend(ids, m.init_state(2)), "the chunk has 3 rows, the state 2"),
        (lambda m, ids: m.extend(ids, m.init_state(3), lengths=torch.tensor([1, 2])), "for each row"),
        (lambda m, ids: m.extend(ids, m.init_state(3), lengths=torch.tensor([1, 2, 14])), "from 0 to 13"),
        (lambda m, ids: m.extend(ids, m.init_state(3), lengths=torch.tensor([1, 2, -1])), "from 0 to 13"),
    ],
)
def test_wrong_inputs_are_explained(call: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        call(network(), tokens())
    assert message in str(error.value)


def test_each_form_asks_for_what_it_needs() -> None:
    ids = tokens()
    with pytest.raises(InputError, match="needs the side tensor 'prefix'"):
        network("prefix")(ids)
    model = network("encoder_decoder")
    with pytest.raises(InputError, match="needs a source"):
        model(ids)
    with pytest.raises(InputError, match="needs a source"):
        model.init_state(3)
    with pytest.raises(InputError, match="the source has 2 rows, the ids 3"):
        model(ids, source=ids[:2])
    with pytest.raises(UnsupportedError, match="one source per row"):
        model(ids, source=ids, documents=ids)
    padded = model.init_state(1, source=ids[:1], source_padding=ids[:1] >= 0)
    with pytest.raises(UnsupportedError, match="give every source a padding, or none"):
        type(padded).join([padded, model.init_state(1, source=ids[:1])])
    with pytest.raises(UnsupportedError, match="pad the sources to one length"):
        type(padded).join([model.init_state(1, source=ids[:1, :n]) for n in (4, 5)])
    encoder = network("encoder")
    with pytest.raises(UnsupportedError, match="an encoder sees whole sequences"):
        encoder.init_state(1)


def test_learned_positions_end_with_the_context() -> None:
    model, ids = network("learned"), tokens()
    with pytest.raises(InputError, match="position 13 is beyond the 13 learned positions"):
        model(torch.cat([ids, ids[:, :1]], 1))
    with torch.no_grad():
        state = model.init_state(3)
        model.extend(ids[:, :11], state)
        # Row 0 is full after these two; places that hold no token do not ask for a position.
        model.extend(ids[:, :2], state, lengths=torch.tensor([2, 1, 0]))
        model.extend(ids[:, :2], state, lengths=torch.tensor([0, 1, 2]))
        with pytest.raises(InputError, match="position 13 is beyond"):
            model.extend(ids[:, :1], state)


@pytest.mark.parametrize(
    "data, message",
    [
        ({"form": "encoder_decoder"}, "go together"),
        ({"encoder": {"depth": 1}}, "go together"),
        ({"form": "encoder_decoder", "encoder": {}, "block": BLOCK}, "no block of the decoder looks at the encoder"),
        ({"block": {"mixer": ATTENTION, "cross": ATTENTION}}, "but there is none: use form: encoder_decoder"),
        ({"position": "rope"}, "does not act on the embedding"),
        ({"widht": 3}, "did you mean 'width'"),
        ({"block": BLOCK, "blocks": {"a": BLOCK}}, "either block, or blocks"),
        ({"pattern": ["a"]}, "a pattern needs blocks"),
        ({"blocks": {}}, "blocks is empty"),
        ({"blocks": {"a": BLOCK, "b": BLOCK}}, "pattern: [a, b]"),
        ({"blocks": {"a": BLOCK}, "pattern": ["a", "c"]}, "the pattern names 'c', but blocks has a"),
        ({"depth": 2, "overrides": {2: BLOCK}}, "overrides names block 2, but the blocks are 0 to 1"),
    ],
)
def test_contradictory_settings_are_explained(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        parse(ModelSettings, data)
    assert message in str(error.value)


def test_the_vocabulary_must_be_known() -> None:
    with pytest.raises(SettingsError, match="the vocabulary is not known"):
        build(ModelSettings())


# -- taps


def test_every_tap_is_listed_passed_and_watchable() -> None:
    for form in FORMS:
        model, ids, more = network(form), tokens(), around(form)
        taps = Taps(["*"])
        expected = model(ids, **more)
        assert torch.equal(model(ids, **more, taps=taps), expected)
        assert list(dict.fromkeys(model.taps())) == list(taps.seen)
        prefix = "decoder." if form == "encoder_decoder" else ""
        for name in ("residual.pre", "residual.mid", "residual.post", "mixer.in", "mixer.out", "mixer.v"):
            assert f"{prefix}blocks.1.{name}" in taps.seen, name
        if form == "encoder_decoder":
            assert {"encoder.blocks.0.mixer.weights", "decoder.blocks.1.cross.weights"} <= set(taps.seen)


def test_the_residual_stream_adds_up(agree: Any) -> None:
    model, taps = network(), Taps(["blocks.*"])
    model(tokens(), taps=taps)
    seen = taps.seen
    for i in range(2):
        at = f"blocks.{i}"
        agree(seen[f"{at}.residual.pre"] + seen[f"{at}.mixer.out"], seen[f"{at}.residual.mid"])
        agree(seen[f"{at}.residual.mid"] + seen[f"{at}.channel.out"], seen[f"{at}.residual.post"])
    assert torch.equal(seen["blocks.0.residual.post"], seen["blocks.1.residual.pre"])


def test_an_edit_acts_in_forward_and_in_extend(agree: Any) -> None:
    model, ids = network("mixed"), tokens()

    def silence(value: Tensor) -> Tensor:
        return value * 0

    edits = Taps(edits=[("blocks.0.mixer.out", silence), ("blocks.1.*.out", silence)])
    taps = edits.joined(Taps(["norm"]))
    with torch.no_grad():
        y = model(ids, taps=taps)
        x = model.embed.weight[ids]
        first = model.blocks.get_submodule("0")
        channel = first.get_submodule("channel")
        x = x + channel(x, Context())
        assert model.norm is not None
        agree(y, model.norm(x) @ model.embed.weight.t())
        state = model.init_state(3)
        pieces = [model.extend(ids[:, a:b], state, taps=edits) for a, b in ((0, 4), (4, 5), (5, 13))]
        agree(torch.cat(pieces, 1), y)
    assert len(taps.parts[1].seen) == 1  # type: ignore[attr-defined]
