"""ALiBi and T5 buckets against transformers."""

from __future__ import annotations

import pytest
import torch

from armillary.base.errors import SettingsError
from armillary.nn.mechanism import Place
from armillary.nn.positions.alibi import AlibiSettings, slopes
from armillary.nn.positions.t5 import T5PositionSettings


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 6, 8, 12, 16])
def test_alibi_slopes_and_scores_are_blooms(heads: int) -> None:
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    length = 9
    theirs = build_alibi_tensor(torch.ones(1, length), heads, torch.float32).view(heads, length)
    torch.testing.assert_close(torch.tensor(slopes(heads)), theirs[:, 1], rtol=1e-6, atol=0)
    steps = torch.arange(length)[None]
    ours = AlibiSettings().build(Place(16), heads).bias(steps, steps)[0]
    # Bloom adds slope·key, which differs from −slope·(query − key) by a number per query: nothing to a softmax.
    shifted = theirs[:, None] - theirs[:, :, None]
    seen = torch.ones(length, length).tril().bool()
    torch.testing.assert_close(ours[:, seen], shifted[:, seen], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("both_sides", [False, True])
@pytest.mark.parametrize("buckets, farthest", [(32, 128), (8, 20), (16, 100), (4, 3)])
def test_buckets_are_t5s(both_sides: bool, buckets: int, farthest: int) -> None:
    from transformers.models.t5.modeling_t5 import T5Attention

    order = "bidirectional" if both_sides else "causal"
    ours = T5PositionSettings(buckets=buckets, farthest=farthest).build(Place(16, order=order), 2)
    relative = torch.arange(-300, 301)
    expected = T5Attention._relative_position_bucket(relative, both_sides, buckets, farthest)
    assert torch.equal(ours.bucket(relative), expected)
    # on both sides one bucket is out of reach: that of distance 0 to the right
    assert len(expected.unique()) == (buckets - 1 if both_sides else buckets)


def test_buckets_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingsError, match="multiple of 4"):
        T5PositionSettings(buckets=6)
    with pytest.raises(SettingsError, match="above buckets/2"):
        T5PositionSettings(buckets=32, farthest=16)
