"""Relative positions of Transformer-XL (Dai et al. 2019): scores by content and by distance, each with a bias.

The score of query i and key j is (q_i + u)·k_j + (q_i + v)·W_R r(i − j), with r the sinusoids of the
distance. Instead of forming r for every distance and shifting, the product is taken apart by the
addition theorems: W_Rᵀ(q_i + v), turned by the query's position, meets the sinusoids of the key's.
That is exact at any positions (packed, ragged, a ring) and needs no table of distances.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from armillary.base.errors import UnsupportedError
from armillary.nn.cost import Cost
from armillary.nn.example import Example
from armillary.nn.linear import Linear
from armillary.nn.mechanism import Place, Position, PositionSettings, Scores, positions


@positions.register
class TransformerXLPositionSettings(PositionSettings):
    """(q + u)·k + (q + v)·W_R r(i − j), with u, v and W_R of every layer trained."""

    kind: ClassVar[str] = "transformer_xl"
    source: ClassVar[str] = "Dai et al. 2019, Transformer-XL: Attentive Language Models beyond a Fixed-Length Context"
    oracle: ClassVar[str] = (
        "tests/nn/positions/test_transformer_xl.py: the relative attention of transformers' XLNet, outputs and "
        "gradients, and the paper's formula as loops"
    )
    sites: ClassVar[frozenset[str]] = frozenset({"relate"})
    segments: bool = Field(
        False, description="two more trained keys per head, for tokens of the same and of another segment (XLNet)"
    )

    @classmethod
    def examples(cls) -> list[Example]:
        return [Example("causal", cls(), compiled=True), Example("both_sides", cls(), {"order": "bidirectional"})]

    def build(self, place: Place, heads: int = 1, head_width: int = 0) -> TransformerXLPosition:
        if self.segments and place.order != "bidirectional":
            raise UnsupportedError(
                "relative segments are known of whole sequences only", where=place.path, hint="use form: encoder"
            )
        return TransformerXLPosition(place, heads, head_width, self.segments)

    def cost(self, place: Place, length: int, heads: int, kv_heads: int, head_width: int) -> Cost:
        width, features = place.width, heads * head_width
        own = 2 * features + 2 * width * features + heads * width * 3  # both sums, W_Rᵀ(q + v), its turn
        angles = 3 * width  # of queries and of keys: an angle, its sine and cosine, for half the features
        pairs = float(length * length)
        return Cost(length * (own + angles + 2) + pairs * heads * (2 * width + 2))


class TransformerXLPosition(Position):
    """u, v [H, K] and W_R from sinusoids [D] to [H·K]; with segments, w [H, K] and a key for each of same and
    other [2, H, K], so that (q + w)·segment[other or not] joins the score (Yang et al. 2019, XLNet)."""

    sites = TransformerXLPositionSettings.sites

    def __init__(self, place: Place, heads: int, head_width: int, segments: bool = False) -> None:
        super().__init__()
        if place.width % 2:
            raise UnsupportedError(
                f"sinusoids come in pairs, but the width is {place.width}", where=place.path, hint="make width even"
            )
        self.heads, self.head_width, self.pairs = heads, head_width, place.width // 2
        self.u = nn.Parameter(torch.empty(heads, head_width))
        self.v = nn.Parameter(torch.empty(heads, head_width))
        self.w = nn.Parameter(torch.empty(heads, head_width)) if segments else None
        self.segment = nn.Parameter(torch.empty(2, heads, head_width)) if segments else None
        self.r: Any = place.product(place.width, heads * head_width, "r")

    def reset(self, generator: torch.Generator | None) -> None:
        nn.init.zeros_(self.u)
        nn.init.zeros_(self.v)
        if self.w is not None and self.segment is not None:
            nn.init.zeros_(self.w)
            nn.init.normal_(self.segment, std=0.02, generator=generator)

    def relate(self, q: Tensor, q_pos: Tensor, k_pos: Tensor) -> tuple[Tensor, Scores]:
        near = q + self.v.to(q.dtype)
        # W_Rᵀ(q + v) of every head, [B, T, H, D]
        met = torch.einsum("bthk,hkd->bthd", near, self._matrix(q).view(self.heads, self.head_width, -1))
        # Only differences count, so they are kept small: far into a stream angles would lose digits.
        base = q_pos[:, :1]
        sin, cos = self._angles(q_pos - base, q.dtype)
        s, c = met[..., : self.pairs], met[..., self.pairs :]
        turned = torch.cat([c * sin[:, :, None] - s * cos[:, :, None], s * sin[:, :, None] + c * cos[:, :, None]], -1)
        keys = torch.cat(self._angles(k_pos - base, q.dtype), -1)  # [B or 1, S, D]
        return q + self.u.to(q.dtype), partial(_scores, turned.transpose(1, 2), keys)

    def compare(self, q: Tensor, segments: Tensor) -> Scores:
        """Scores of queries q [B, T, H, K] for tokens of their own and of other segments [B, T]."""
        assert self.w is not None and self.segment is not None
        same, other = torch.einsum("bthk,shk->sbht", q + self.w.to(q.dtype), self.segment.to(q.dtype))
        return partial(_compared, same, other, segments)

    def _matrix(self, like: Tensor) -> Tensor:
        """W_R [H·K, D]; a product of another kind than a plain matrix shows it on the identity."""
        if isinstance(self.r, Linear):
            return self.r.weight.to(like.dtype)
        return self.r(torch.eye(2 * self.pairs, dtype=like.dtype, device=like.device)).t()  # type: ignore[no-any-return]

    def _angles(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Sine and cosine [B or 1, T, D/2] of each position's angles."""
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        steps = torch.arange(self.pairs, device=positions.device, dtype=kind)
        angles = positions[..., None].to(kind) * 10000.0 ** (-steps / self.pairs)
        return angles.sin().to(dtype), angles.cos().to(dtype)


def _compared(same: Tensor, other: Tensor, segments: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    apart = segments[:, rows, None] != segments[:, None, columns]
    return torch.where(apart[:, None], other[:, :, rows, None], same[:, :, rows, None])


def _scores(turned: Tensor, keys: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """turned [B, H, T, D], keys [B or 1, S, D] → [B, H, rows, columns]; heads are rows of one product."""
    return turned[:, :, rows] @ keys[:, None, columns].transpose(-2, -1)
