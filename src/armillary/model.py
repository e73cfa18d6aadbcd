"""The model that a user holds: a network with its tokenizer, and everything people do with it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from armillary.base.errors import InputError, UnsupportedError, nearest
from armillary.base.settings import Choice, parse
from armillary.checkpoints import load as load_checkpoint
from armillary.checkpoints import save as save_checkpoint
from armillary.checkpoints.adapters import read_adapter
from armillary.engine.beam import Beams
from armillary.engine.core import Engine
from armillary.engine.drafts import Drafter, DraftModel, check_draft
from armillary.engine.embed import embed, padded, whole
from armillary.engine.embed import texts as whole_texts
from armillary.engine.generate import Completion, Completions, Piece, generate, generate_beams, stream
from armillary.engine.replay import Held
from armillary.engine.sampling import Sampling
from armillary.engine.watermark import Detection, Watermark, detect
from armillary.nn import network as networks
from armillary.nn.adapted import adapted as with_changes
from armillary.nn.cache import Cache
from armillary.nn.describe import Description, describe
from armillary.nn.driver import drivers
from armillary.nn.heads.base import Pool, heads
from armillary.nn.heads.classification import ClassifierSettings
from armillary.nn.mechanism import channels, mixers, norms, positions
from armillary.nn.network import ModelSettings, Network
from armillary.nn.network_state import NetworkState
from armillary.nn.side import sides
from armillary.nn.taps import Edit, Seen, Taps
from armillary.objectives import objectives
from armillary.recipe import Recipe
from armillary.text import Tokenizer

# Watches and edits in force, per thread and task; taken up by calls of the model they belong to.
_taps: ContextVar[tuple[tuple[int, Taps], ...]] = ContextVar("taps", default=())

Prompt = str | Sequence[str] | Sequence[int] | Tensor


class Model(nn.Module):
    """A network and what surrounds it.

    network: the bare network; tokenizer: None for a model that only knows ids; recipe: how it was
    made, when known.
    """

    def __init__(self, network: Network, tokenizer: Tokenizer | None = None, recipe: Recipe | None = None) -> None:
        super().__init__()
        self.network = network
        self._tokenizer = tokenizer
        self.recipe = recipe

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer; raises UnsupportedError when the model has none."""
        if self._tokenizer is None:
            raise UnsupportedError("this model has no tokenizer", hint="call it on token ids")
        return self._tokenizer

    @property
    def settings(self) -> ModelSettings:
        return self.network.settings

    @property
    def device(self) -> torch.device:
        return self.network.device

    # -- numbers

    def forward(self, ids: Tensor, **inputs: Any) -> Tensor:
        """ids [B, T] int64 → logits [B, T, V] (or what the head gives); inputs as in `Network.hidden`."""
        return self.network(ids, **self._tapped(inputs))  # type: ignore[no-any-return]

    def hidden(self, ids: Tensor, **inputs: Any) -> Tensor:
        """ids [B, T] → the last hidden states [B, T, D]."""
        return self.network.hidden(ids, **self._tapped(inputs))

    def init_state(self, batch: int, capacity: int | None = None, **inputs: Any) -> NetworkState:
        """An empty state for `batch` rows; an encoder–decoder takes source=ids and encodes it here. cache=…:
        how keys and values are kept (see `nn.cache`)."""
        return self.network.init_state(batch, capacity, **inputs)

    def extend(self, ids: Tensor, state: NetworkState, **inputs: Any) -> Tensor:
        """Logits [B, T, V] of the next chunk: the same numbers as one whole call, whatever the chunks."""
        return self.network.extend(ids, state, **self._tapped(inputs))

    # -- text

    @overload
    def generate(self, prompt: str | Tensor, *, stream: bool = False, **options: Any) -> Any: ...
    @overload
    def generate(self, prompt: Sequence[str] | Sequence[int], *, stream: bool = False, **options: Any) -> Any: ...
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool = False,
        side: Mapping[str, Tensor] | None = None,
        watermark: Watermark | None = None,
        cache: Cache | None = None,
        drafter: Drafter | None = None,
        weights: Held = "auto",
        **options: Any,
    ) -> Any:
        """Complete a prompt.

        prompt: text, several texts, or token ids ([T], or [B, T]); options: see `Sampling`
        (max_new_tokens, temperature, top_k, top_p, min_p, penalties, logit_bias, stop, seed, …); side:
        numbers that mechanisms take (`tasks`), [prompts] by name; watermark: marks the answers for whoever
        holds its key (see `detect`); cache: how keys and values are kept, to save memory (see `nn.cache`);
        drafter: guesses tokens, which are then checked together, for speed (see `drafter`, `PromptLookup`);
        weights: how decoding on a CPU holds them (see `Engine`). max_new_tokens is taken at its word, beyond the
        context that a model is made for, too: `room` says what is left of that.
        Returns a Completion (.text .ids .logprobs .finish), or Completions for several prompts. With
        stream=True yields pieces of text (for several prompts: Piece, with its row).

        With beams=4 a beam search takes the place of the draws; it has the options of `Beams`
        (length_penalty, early_stopping, …), and a Completion's .score. With returned above 1 each prompt has
        Completions, the best first.
        """
        if options.get("beams") is not None:
            held = weights not in ("auto", "plain")
            refused = (
                (stream, "be streamed"),
                (watermark, "be watermarked"),
                (cache, "take a cache"),
                (drafter, "take a drafter"),
                (held, "hold weights"),
            )
            for given, what in refused:
                if given:
                    raise UnsupportedError(f"a search with beams cannot {what}", hint="leave beams out")
            return self._searched(*self._prompts(prompt), Beams.of(options), side)
        sampling = Sampling.of({name: value for name, value in options.items() if name != "beams"})
        starts, single = self._prompts(prompt)
        return self._complete(starts, single, sampling, stream, side, watermark, cache, drafter, weights)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        stream: bool = False,
        watermark: Watermark | None = None,
        **options: Any,
    ) -> Any:
        """Answer a conversation ([{"role": "user", "content": …}, …]) through the chat template."""
        sampling = Sampling.of(options)
        starts = [self.tokenizer.encode_chat(list(messages))]
        return self._complete(starts, True, sampling, stream, mark=watermark)

    def embed(self, texts: str | Sequence[str], *, pool: Pool = "mean", normalise: bool = False) -> Tensor:
        """One vector per text, [N, D] float32 ([D] for one text): the pooled last hidden states.

        pool: mean, first or last; a model with an embedding head uses its own pooling.
        """
        if pool not in ("mean", "first", "last"):
            raise InputError(f"pool is '{pool}'", hint="use mean, first or last")
        many = [texts] if isinstance(texts, str) else list(texts)
        vectors = embed(self.network, whole_texts(self.network, self.tokenizer, many), pool, self.hidden)
        vectors = F.normalize(vectors, dim=-1) if normalise else vectors
        return vectors[0] if isinstance(texts, str) else vectors

    def neighbours(self, text: str, count: int = 10) -> list[tuple[str, float]]:
        """The entries of the vocabulary whose embeddings point the way of the text's (the mean of its
        tokens'): (token, cosine), the nearest first, without those of the text and special ones.

        Tokens are embeddings alone, whatever blocks the model has; of a model trained by skip_gram they are
        its word vectors (Mikolov et al. 2013).
        """
        ids = self.tokenizer.encode(text)
        if not ids or count < 1:
            raise InputError("neighbours need a text and a count of at least 1")
        table = F.normalize(self.network.embed.weight.detach().float(), dim=-1)
        given = torch.tensor(sorted({*ids, *self.tokenizer.special.values()}), device=table.device)
        near = table @ F.normalize(table[ids].mean(0), dim=0)
        near = near[: self.tokenizer.size].index_fill(0, given, -2.0)
        best = near.topk(min(count, int((near > -2).sum())))
        return [
            (self.tokenizer.decode([i]), v) for i, v in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]

    def classify(self, texts: str | Sequence[str], labels: Sequence[str] | None = None) -> Any:
        """Probabilities of classes, {label: probability} per text.

        A model with a classification head uses it. A language model needs `labels` and compares how
        likely each is, per byte, as the continuation of the text.
        """
        many = [texts] if isinstance(texts, str) else list(texts)
        head = self.settings.head
        if isinstance(head, ClassifierSettings):
            if labels is not None:
                raise InputError("this model has its own classes; leave labels out")
            names = list(head.labels or [str(i) for i in range(head.classes)])
            ids, padding = padded(whole_texts(self.network, self.tokenizer, many), self.device)
            with torch.no_grad():
                scores = self(ids, padding=padding).float()
        else:
            if not labels:
                raise InputError("a language model needs the labels to choose from", hint='pass labels=["…", "…"]')
            names = list(labels)
            scores = torch.tensor([[self._fit(text, label) for label in names] for text in many])
        found = [dict(zip(names, row.tolist(), strict=True)) for row in torch.softmax(scores, -1)]
        return found[0] if isinstance(texts, str) else found

    def score(self, text: str) -> tuple[list[int], list[float]]:
        """The tokens of a text and the log-probability of each, in nats, given those before it."""
        ids = self._begun(self.tokenizer.encode(text))
        if len(ids) < 2:
            raise InputError("a text needs at least one token to be scored")
        row = torch.tensor([ids], device=self.device)
        with torch.no_grad():
            nll = self.network.token_nll(self.hidden(row[:, :-1]), row[:, 1:])
        return ids[1:], (-nll[0]).tolist()

    def engine(self, **options: Any) -> Engine:
        """An engine on this model, for many answers at a time (see `Engine`): options such as slots, memory."""
        return Engine(self.network, self._tokenizer, **options)

    def room(self, prompt: Prompt | Sequence[Mapping[str, str]], capacity: int | None = None) -> int:
        """Tokens that an answer may have after the longest of the prompts, or after a conversation, within `capacity`
        tokens, by default the context that the model is made for; 0 or less: the prompt alone fills it."""
        items = prompt if isinstance(prompt, (str, Tensor)) else list(prompt)
        if isinstance(items, list) and items and isinstance(items[0], Mapping):
            starts = [self.tokenizer.encode_chat([dict(one) for one in items if isinstance(one, Mapping)])]
        else:
            starts, _ = self._prompts(items)  # type: ignore[arg-type]  # no conversation
        if self.settings.form == "encoder_decoder":  # the answer does not stand behind what the encoder reads
            starts = self._begins(starts)
        return (capacity or self.settings.context) - max(map(len, starts), default=0)

    def drafter(
        self, draft: Model, count: int = 6, sure: float = 0.0, *, rows: int = 16, weights: Held = "auto"
    ) -> DraftModel:
        """Guesses by a smaller model with the same vocabulary (see `DraftModel`), for `generate` and `engine`; they
        change no answer. Raises InputError where the vocabularies differ."""
        check_draft(draft.settings.form, self.tokenizer, draft._tokenizer)
        vocabulary = self.settings.vocabulary
        return DraftModel(draft.network, count, sure, rows=rows, weights=weights, vocabulary=vocabulary)

    def adapted(self, folder: str | Path) -> Model:
        """The model with an adapter from a folder (LoRA as `peft` saves it); it shares this one's weights.

        Raises CheckpointError or UnsupportedError naming the tensor, product or setting that does not fit.
        """
        changes = read_adapter(folder, self.network)
        return Model(with_changes(self.network, changes), self._tokenizer, self.recipe).eval()

    # -- looking inside

    def describe(self, *, length: int | None = None, batch: int = 1) -> Description:
        """Parameters, FLOPs, state bytes and training memory, as data."""
        return describe(self.settings, length=length, batch=batch, bf16=self.network.dtype == torch.bfloat16)

    def taps(self) -> list[str]:
        """Every place that can be watched or edited."""
        return self.network.taps()

    @contextlib.contextmanager
    def watch(self, *patterns: str) -> Iterator[Seen]:
        """Record what passes the named places, for calls inside the block: name → tensor.

        Patterns are shell-style: `blocks.*.mixer.weights`. Raises InputError when one matches nothing.
        """
        self._known(patterns)
        taps = Taps(watch=patterns)
        with self._with(taps):
            yield taps.seen

    @contextlib.contextmanager
    def edit(self, pattern: str, change: Edit) -> Iterator[None]:
        """Replace what passes the named places by change(tensor), for calls inside the block."""
        self._known((pattern,))
        with self._with(Taps(edits=[(pattern, change)])):
            yield

    # -- parts

    def _tapped(self, inputs: dict[str, Any]) -> dict[str, Any]:
        mine = [taps for owner, taps in _taps.get() if owner == id(self)]
        if not mine:
            return inputs
        joined = mine[0]
        for taps in mine[1:]:
            joined = joined.joined(taps)
        return inputs | {"taps": joined}

    @contextlib.contextmanager
    def _with(self, taps: Taps) -> Iterator[None]:
        token = _taps.set((*_taps.get(), (id(self), taps)))
        try:
            yield
        finally:
            _taps.reset(token)

    def _known(self, patterns: Sequence[str]) -> None:
        names = self.taps()
        for pattern in patterns:
            probe = Taps(watch=[pattern])
            if not any(probe.watches(name) for name in names):
                raise InputError(f"no tap matches '{pattern}'", hint=nearest(pattern, names))

    def _prompts(self, prompt: Prompt) -> tuple[list[list[int]], bool]:
        if isinstance(prompt, Tensor):
            if prompt.dim() not in (1, 2):
                raise InputError(f"a prompt of shape {tuple(prompt.shape)}", hint="pass ids [T] or [B, T]")
            return (prompt if prompt.dim() == 2 else prompt[None]).tolist(), prompt.dim() == 1
        if isinstance(prompt, str):
            return [self._begun(self.tokenizer.encode(prompt))], True
        items = list(prompt)
        if items and all(isinstance(item, str) for item in items):
            return [self._begun(self.tokenizer.encode(str(item))) for item in items], False
        numbers = [item for item in items if isinstance(item, int)]
        if items and len(numbers) == len(items):
            return [numbers], True
        raise InputError("a prompt is text, a list of texts, or token ids")

    def _begun(self, ids: list[int]) -> list[int]:
        """Documents begin with a boundary token, so prompts do too; what an encoder reads is a whole text."""
        if self.settings.form == "encoder_decoder":
            return whole(self.tokenizer, ids)
        begin = self.tokenizer.begin
        return ids if begin is None else [begin, *ids]

    def _complete(
        self,
        starts: list[list[int]],
        single: bool,
        sampling: Sampling,
        streaming: bool,
        side: Mapping[str, Tensor] | None = None,
        mark: Watermark | None = None,
        cache: Cache | None = None,
        drafter: Drafter | None = None,
        weights: Held = "auto",
    ) -> Any:
        taps, sources = self._tapped({}).get("taps"), None
        if self.settings.form == "encoder_decoder":
            sources, starts = starts, self._begins(starts)
        more: dict[str, Any] = {"sources": sources, "side": side, "taps": taps}
        more |= {"mark": mark, "cache": cache, "drafter": drafter, "weights": weights}
        if streaming:
            pieces = stream(self.network, self.tokenizer, starts, sampling, **more)
            return (piece.text for piece in pieces) if single else pieces
        done = generate(self.network, self.tokenizer, starts, sampling, **more)
        return done[0] if single else done

    def _begins(self, sources: list[list[int]]) -> list[list[int]]:
        """Where a decoder starts: at the last token of its source, as in our training, if the model does not say."""
        start = self.settings.start
        return [ids[-1:] if start is None else [start] for ids in sources]

    def _searched(self, starts: list[list[int]], single: bool, asked: Beams, side: Mapping[str, Tensor] | None) -> Any:
        taps, sources = self._tapped({}).get("taps"), None
        if self.settings.form == "encoder_decoder":
            sources, starts = starts, self._begins(starts)
        more: dict[str, Any] = {"sources": sources, "side": side, "taps": taps}
        done = generate_beams(self.network, self.tokenizer, starts, asked, **more)
        if asked.returned > 1:
            return done[0] if single else done
        return done[0][0] if single else Completions(one[0] for one in done)

    def _fit(self, text: str, label: str) -> float:
        before, _ = self.score(text) if text else ([], [])
        ids, logprobs = self.score(text + label)
        # The tokens that the label adds; a merge across the seam counts as the label's.
        same = 0
        while same < min(len(before), len(ids)) and before[same] == ids[same]:
            same += 1
        return sum(logprobs[same:]) / max(1, len(label.encode("utf-8")))


def build(settings: ModelSettings | Mapping[str, Any], *, seed: int = 0, device: str = "cpu") -> Model:
    """An untrained model; model.vocabulary must be set, for there is no tokenizer."""
    return Model(networks.build(parse(ModelSettings, settings, ("model",)), seed=seed, device=device))


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    revision: str | None = None,
    mapped: bool = False,
) -> Model:
    """A model from a run folder, a checkpoint folder in the native or an open layout, or a hub name.

    device: auto, cpu, cuda, …; dtype: auto (as stored), float32, bf16, float16; revision: of a hub
    name; mapped: weights that are used as they are stored stay in their files, in memory where they are looked at
    (the files must not be written to meanwhile). Raises CheckpointError naming what is missing, extra or wrongly
    shaped.
    """
    if quantize is not None:
        raise UnsupportedError(f"quantize='{quantize}': no quantised weights yet", hint="leave it out")
    loaded = load_checkpoint(path, device=device, dtype=dtype, revision=revision, mapped=mapped)
    return Model(loaded.network.eval(), loaded.tokenizer, loaded.recipe).eval()


def save(model: Model, folder: str | Path, layout: str = "native") -> None:
    """Write a model folder; layout: native, or open (the layout that other tools read)."""
    save_checkpoint(Path(folder), model.network, model._tokenizer, model.recipe, layout=layout)


def mechanisms(role: str) -> dict[str, type[Choice]]:
    """Everything registered for a role (mixer, channel, position, norm, head, driver, side, objective): name → settings
    class, with `.source` and, for mixers, `.capabilities`."""
    known = {r.role: r for r in (mixers, channels, positions, norms, heads, drivers, sides, objectives)}
    if role not in known:
        raise InputError(f"there is no role '{role}'", hint=nearest(role, known))
    return dict(known[role])


__all__ = [
    "Completion",
    "Completions",
    "Detection",
    "Model",
    "Piece",
    "Watermark",
    "build",
    "detect",
    "load",
    "mechanisms",
    "save",
]
