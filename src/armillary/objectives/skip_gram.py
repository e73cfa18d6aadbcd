"""word2vec: vectors of tokens by which their neighbours can be told from random tokens.

Mikolov et al. 2013, Distributed Representations of Words and Phrases and their Compositionality: a
centre w, a neighbour c and k tokens n_i drawn at random ask for −log σ(u_c · v_w) − Σ log σ(−u_{n_i} · v_w).
v is the network's embedding, u the weight of its head, and there are no blocks. How far neighbours may
be is drawn for every centre, from 1 to `window`; frequent tokens are left out at random, before
neighbours are counted; random tokens are drawn by count^(3/4), and one that is the neighbour itself is
left out, as in the released program. Special tokens are neither centres nor neighbours.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from armillary.base.errors import SettingsError
from armillary.base.settings import Settings
from armillary.data.batch import Batch
from armillary.nn.heads.language_model import LanguageModelHead, LanguageModelHeadSettings
from armillary.nn.network import ModelSettings, Network
from armillary.objectives.base import Loss, Objective, ObjectiveSettings, Prepared, Vocabulary, objectives

PAIRS = 256  # at a time
SIZES = ("width", "vocabulary", "context")
NONE = -1  # in place of a random token that is the neighbour


@objectives.register
class SkipGramSettings(ObjectiveSettings):
    """Each token tells its neighbours from random tokens."""

    kind: ClassVar[str] = "skip_gram"
    source: ClassVar[str] = (
        "Mikolov et al. 2013, Distributed Representations of Words and Phrases and their Compositionality"
    )
    oracle: ClassVar[str] = (
        "tests/objectives/test_skip_gram.py: the paper's loss as a loop over pairs, its gradients, and its shares"
    )
    window: int = Field(5, gt=0, description="how far a neighbour may be on either side")
    negatives: int = Field(5, gt=0, description="random tokens for every neighbour")
    power: float = Field(0.75, ge=0, description="random tokens are drawn by their count to this power")
    frequent: float | None = Field(
        1e-3, gt=0, description="tokens of a larger share f of the text are kept at √(this / f); null: all are kept"
    )

    def check(self, model: ModelSettings) -> None:
        if model.depth or model.form != "encoder":
            raise SettingsError(
                f"the skip_gram objective needs vectors of single tokens, but model.form is {model.form} "
                f"with {model.depth} blocks",
                path=("training", "objective"),
                hint="use form: encoder and depth: 0",
            )
        if not isinstance(model.head, LanguageModelHeadSettings) or model.head.tied:
            raise SettingsError(
                "the skip_gram objective learns a second table of vectors, for neighbours",
                path=("training", "objective"),
                hint="use head: {kind: language_model, tied: false}",
            )
        # Pairs of rows of two tables are all that it knows: whatever else a model does would not be learned.
        bare = ModelSettings(form="encoder", depth=0, norm=None, head=LanguageModelHeadSettings(tied=False))
        more = [f"model.{name}" for name in _differing(model, bare) if name not in (*SIZES, "head")]
        more += [f"model.head.{name}" for name in _differing(model.head, bare.head)]
        if more:
            raise SettingsError(
                f"the skip_gram objective takes rows of two tables as they are, without {', '.join(more)}",
                path=("training", "objective"),
                hint="leave them out (of the norm: norm: null)" if "model.norm" in more else "leave them out",
            )

    def build(self, vocabulary: Vocabulary) -> SkipGram:
        return SkipGram(self, vocabulary)


def _differing(settings: Settings, other: Settings) -> list[str]:
    """Names of the fields in which two settings of a class differ."""
    return [name for name in type(other).model_fields if getattr(settings, name) != getattr(other, name)]


class SkipGram(Objective):
    """targets: [B, T, 2·window, 1 + negatives] a neighbour and random tokens; weights: [B, T, 2·window].

    Where the vocabulary does not say how often tokens occur, all count alike and none is frequent.
    """

    def __init__(self, settings: SkipGramSettings, vocabulary: Vocabulary) -> None:
        self.settings = settings
        known = vocabulary.counts is not None
        counts = vocabulary.counts().double() if vocabulary.counts is not None else torch.ones(vocabulary.size).double()
        special = torch.tensor(sorted(set(vocabulary.special)), dtype=torch.int64)
        counts = counts.index_fill(0, special, 0.0)
        if not bool((counts > 0).any()):
            raise SettingsError("the training text has no ordinary token", path=("training", "objective"))
        drawn = counts**settings.power * (counts > 0)
        self.reach = drawn.cumsum(0)
        self.kept = torch.ones_like(counts)
        if settings.frequent is not None and known:
            share = counts / counts.sum()
            self.kept = (settings.frequent / share.clamp(min=1e-300)).sqrt().clamp(max=1.0)
        self.kept = self.kept.index_fill(0, special, 0.0)

    def blank(self, vocabulary: int) -> float:
        return (1 + self.settings.negatives) * math.log(2)

    def prepare(self, batch: Batch, generator: torch.Generator) -> Prepared:
        rows, length = batch.ids.shape
        window, count = self.settings.window, self.settings.negatives
        kept = torch.rand(rows, length, generator=generator, dtype=torch.float64) < self.kept[batch.ids]
        order = (~kept).long().argsort(dim=1, stable=True)  # those that stay move together
        ids = batch.ids.gather(1, order)
        there = kept.gather(1, order)
        offsets = torch.cat([torch.arange(-window, 0), torch.arange(1, window + 1)])
        places = torch.arange(length)[:, None] + offsets
        inside, places = (places >= 0) & (places < length), places.clamp(0, length - 1)
        radius = torch.randint(1, window + 1, (rows, length, 1), generator=generator)
        asked = inside & there[:, :, None] & there[:, places] & (offsets.abs() <= radius)
        if batch.documents is not None:
            documents = batch.documents.gather(1, order)
            asked &= documents[:, :, None] == documents[:, places]
        neighbours = ids[:, places][..., None]
        chance = torch.rand(rows, length, 2 * window, count, generator=generator, dtype=torch.float64)
        drawn = torch.searchsorted(self.reach, chance * self.reach[-1], right=True).clamp(max=len(self.reach) - 1)
        drawn = torch.where(drawn == neighbours, NONE, drawn)
        return Prepared(ids, torch.cat([neighbours, drawn], -1), asked.float())

    def loss(self, network: Network, prepared: Prepared) -> Loss:
        assert isinstance(network.head, LanguageModelHead)
        hidden = network.hidden(prepared.ids, **prepared.inputs)
        row, token, place = prepared.weights.nonzero(as_tuple=True)
        choices, centres = prepared.targets[row, token, place], hidden[row, token]
        total: Tensor = _Pairs.apply(centres, network.head.product.weight.to(hidden.dtype), choices)  # type: ignore[no-untyped-call]
        return Loss(total, prepared.weights.sum(), {"nats": total.detach()})


class _Pairs(torch.autograd.Function):
    """The summed loss of centres [P, D] and their choices [P, 1 + k], rows of a table [V, D], the first right.

    A few pairs at a time, so that the rows picked stay in the processor's cache; slopes are made on the way.
    """

    @staticmethod
    def forward(ctx: Any, centres: Tensor, table: Tensor, choices: Tensor) -> Tensor:
        wide = torch.promote_types(table.dtype, torch.float32)
        total = torch.zeros((), dtype=wide, device=table.device)
        by_centre, by_table = torch.empty_like(centres), torch.zeros_like(table)
        signs = torch.ones(choices.shape[1], dtype=wide, device=table.device)
        signs[0] = -1.0
        for start in range(0, len(choices), PAIRS):
            part = slice(start, start + PAIRS)
            chosen, centre = choices[part].clamp(min=0), centres[part, None]
            rows = table.index_select(0, chosen.flatten()).view(*chosen.shape, -1)
            scores = (rows * centre).sum(-1).to(wide) * signs
            asked = choices[part] != NONE
            total += torch.where(asked, F.softplus(scores), 0).sum()
            if not any(ctx.needs_input_grad):
                continue
            pull = (torch.sigmoid(scores) * signs * asked).to(table.dtype)[..., None]
            by_centre[part] = (rows * pull).sum(1)
            by_table.index_add_(0, chosen.flatten(), (pull * centre).flatten(0, 1))
        ctx.save_for_backward(by_centre, by_table)
        return total

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        by_centre, by_table = ctx.saved_tensors
        slope = slope.to(by_table.dtype)
        return by_centre * slope, by_table * slope, None
