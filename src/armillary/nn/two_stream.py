"""Two streams of one network: what is said about a token without having seen it (Yang et al. 2019, XLNet).

The content stream is the network on the tokens, each of which sees what the permutation allows and
itself. The query stream has the same weights and knows of its token only where it stands. Here it is
more tokens of the same call, embedded as `queries`, which nobody looks at; so every mixer that takes
positions and a mask from outside computes both streams, and nothing is written twice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from armillary.base.errors import UnsupportedError
from armillary.nn.mask import Pairs
from armillary.nn.network import Network


def two_stream(
    network: Network,
    ids: Tensor,
    seen: Tensor,
    targets: Tensor,
    *,
    padding: Tensor | None = None,
    segments: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Hidden states of the content stream [B, T, D] and of the query stream [B, M, D].

    ids: [B, T]; seen: bool [B, T, T], which tokens (last axis) each one may use, itself for its query
    only; targets: [B, M] places of the tokens that are asked for; padding, segments: [B, T].
    `network.head` makes scores of either stream. Raises UnsupportedError for a network that is not an
    encoder, InputError for one without `queries`.
    """
    if network.settings.form != "encoder":
        raise UnsupportedError("two streams need a network that sees both ways", hint="use form: encoder")
    rows, count, asked = *ids.shape, targets.shape[1]
    device = ids.device
    own = torch.eye(count, dtype=torch.bool, device=device)
    real = torch.ones_like(ids, dtype=torch.bool) if padding is None else padding
    content = (seen & real[:, None]) | own
    query = (seen & real[:, None]).gather(1, targets[..., None].expand(-1, -1, count))
    nobody = torch.zeros(rows, count + asked, asked, dtype=torch.bool, device=device)
    mask = torch.cat([torch.cat([content, query], 1), nobody], 2)
    places = torch.arange(count, device=device).expand(rows, -1)
    hidden = network.hidden(
        torch.cat([ids, ids.gather(1, targets)], 1),
        positions=torch.cat([places, targets], 1),
        queries=torch.arange(count + asked, device=device).expand(rows, -1) >= count,
        segments=None if segments is None else torch.cat([segments, segments.gather(1, targets)], 1),
        mask=Pairs(mask),
    )
    return hidden[:, :count], hidden[:, count:]
