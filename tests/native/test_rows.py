"""The native kernels against their plain PyTorch forms and PyTorch's own autograd."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from armillary.native import available, library, rows
from armillary.native.library import _build as built
from armillary.native.library import compiler

needs_library = pytest.mark.skipif(not available(), reason="there is no C compiler here")
TYPES = [torch.float32, torch.bfloat16]
CLOSE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # bf16 keeps 8 bits: one step is 2^-8 of the value


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("size", "start", "columns", "left", "right"),
    [
        (4, 3, 7, None, 0),
        (5, 0, 5, None, 0),
        (3, 0, 70, None, None),
        (4, 6, 10, 3, 0),
        (4, 2, 9, 2, 3),
        (4, 1, 6, 0, 0),
    ],
)
def test_softmax_rows(
    dtype: torch.dtype, size: int, start: int, columns: int, left: int | None, right: int | None
) -> None:
    scores = (torch.randn(size * 6, columns, generator=torch.Generator().manual_seed(1)) * 8).to(dtype)
    expected = rows.softmax_rows_plain_(scores.clone(), size, start, left, right, 0.3)
    found = rows.softmax_rows_(scores.clone(), size, start, left, right, 0.3)
    assert torch.allclose(found.float(), expected.float(), atol=CLOSE[dtype])
    assert torch.allclose(found.float().sum(1), torch.ones(len(found)), atol=0.02)
    distance = start + torch.arange(size)[:, None] - torch.arange(columns)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if left is not None:
        hidden |= distance > left
    if right is not None:
        hidden |= -distance > right
    assert (found[hidden.repeat(6, 1)] == 0).all() and (found[~hidden.repeat(6, 1)] > 0).all()


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
def test_softmax_rows_survive_large_scores(dtype: torch.dtype) -> None:
    scores = torch.tensor([[3e4, -3e4, 0.0], [-3e38, -3e38, -3e38]], dtype=dtype)
    found = rows.softmax_rows_(scores, 1, 0, None, None, 1.0).float()
    assert torch.allclose(found, torch.tensor([[1.0, 0.0, 0.0], [1 / 3, 1 / 3, 1 / 3]]), atol=2e-3)


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, None), (3, 1)])
def test_softmax_rows_backward_against_autograd(dtype: torch.dtype, left: int | None, right: int | None) -> None:
    generator = torch.Generator().manual_seed(2)
    scores = torch.randn(8, 9, generator=generator).to(dtype).float().requires_grad_()
    slopes = torch.randn(8, 9, generator=generator).to(dtype)
    masked = scores * 0.5
    distance = (5 + torch.arange(4)[:, None] - torch.arange(9)).repeat(2, 1)
    far = 9
    hidden = (distance > (far if left is None else left)) | (-distance > (far if right is None else right))
    masked = masked.masked_fill(hidden, -torch.inf)
    weights = torch.softmax(masked, -1)
    (weights * slopes.float()).sum().backward()
    found = rows.softmax_rows_backward_(weights.detach().to(dtype), slopes.clone(), 4, 5, left, right, 0.5)
    assert torch.allclose(found.float(), scores.grad, atol=4 * CLOSE[dtype])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("form", [rows.cross_entropy_rows_, rows.cross_entropy_rows_plain_])
def test_cross_entropy_rows_against_pytorch(dtype: torch.dtype, form) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = (torch.randn(6, 300, generator=generator) * 4).to(dtype)
    targets = torch.randint(0, 300, (6,), generator=generator)
    shares = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0, 1.0])
    wide = logits.float().requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, targets, reduction="none")
    (expected * shares).sum().backward()
    logits = logits.clone()  # float() of float32 is the same tensor, which autograd holds
    losses = form(logits, targets, shares)
    assert torch.allclose(losses, expected, atol=1e-4)
    assert torch.allclose(logits.float(), wide.grad, atol=4 * CLOSE[dtype])
    assert (logits[1] == 0).all()


@needs_library
def test_targets_outside_the_columns_are_refused() -> None:
    with pytest.raises(IndexError, match="outside the 5 columns"):
        rows.cross_entropy_rows_(torch.zeros(2, 5), torch.tensor([0, 5]), torch.ones(2))


@needs_library
@pytest.mark.parametrize("weights", TYPES)
@pytest.mark.parametrize("count", [1, 3])
def test_few_rows_product(weights: torch.dtype, count: int) -> None:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(count, 130, generator=generator)
    x = x.to(weights)
    weight = torch.randn(77, 130, generator=generator).to(weights)
    expected = x.double() @ weight.double().t()
    assert torch.allclose(rows.few_rows_product(x, weight).double(), expected, rtol=CLOSE[weights], atol=1e-4)
    alone = torch.cat([rows.few_rows_product(one[None], weight) for one in x])
    assert torch.equal(rows.few_rows_product(x, weight), alone)  # a row does not depend on its neighbours


@needs_library
def test_read_all_reads_everything() -> None:
    assert rows.read_all(torch.arange(1000.0)) == 499500.0


@needs_library
def test_bf16_rounds_like_pytorch() -> None:
    """A product of one column is one rounding of a float32 product."""
    values = torch.randn(4096, generator=torch.Generator().manual_seed(5)) * torch.logspace(-20, 20, 4096)
    weight = values.to(torch.bfloat16)[:, None].contiguous()
    third = torch.full((1, 1), 1 / 3).to(torch.bfloat16)
    found = rows.few_rows_product(third, weight)[0]
    assert torch.equal(found, (weight[:, 0].float() * third.float()[0]).to(torch.bfloat16))


@needs_library
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("queries", [1, 3])
def test_few_rows_attend_against_pytorch(dtype: torch.dtype, queries: int) -> None:
    generator = torch.Generator().manual_seed(6)
    q = torch.randn(2, 4, queries, 8, generator=generator).to(dtype)
    held = torch.randn(2, 2, 2, 12, 8, generator=generator).to(dtype)  # room for 12 keys, 9 of them in use
    k, v = held[0, :, :, :9], held[1, :, :, :9]
    starts = torch.tensor([9 - queries, 4])
    last = starts[:, None] + torch.arange(queries)
    mask = torch.arange(9) <= last[:, None, :, None]
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.float(), k.float(), v.float(), attn_mask=mask, scale=0.3, enable_gqa=True
    )
    assert rows.attendable(q, k, v)
    found = rows.few_rows_attend(q, k, v, starts, 0.3)
    assert torch.allclose(found.float(), expected, atol=2 * CLOSE[dtype])


@needs_library
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", TYPES)
def test_few_rows_rmsnorm_against_pytorch(dtype: torch.dtype, offset: float) -> None:
    generator = torch.Generator().manual_seed(7)
    x, weight = torch.randn(3, 50, generator=generator).to(dtype), torch.randn(50, generator=generator).to(dtype)
    expected = torch.nn.functional.rms_norm(x.float(), (50,), weight.float() + offset, 1e-5)
    found = rows.few_rows_rmsnorm(x, weight, 1e-5, offset)
    assert torch.allclose(found.float(), expected, rtol=CLOSE[dtype], atol=1e-5)


def test_without_a_compiler_the_plain_form_runs_and_says_so(tmp_path) -> None:
    code = (
        "import warnings, torch\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    from armillary.native import rows\n"
        "    out = rows.softmax_rows_(torch.zeros(2, 4), 1, 0, None, None, 1.0)\n"
        "    rows.softmax_rows_(torch.zeros(2, 4), 1, 0, None, None, 1.0)\n"
        "assert torch.equal(out, torch.full((2, 4), 0.25))\n"
        "texts = [str(one.message) for one in said if 'compiler' in str(one.message)]\n"
        "assert len(texts) == 1, texts\n"
    )
    environment = {"PATH": "", "HOME": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_a_broken_compiler_is_named(tmp_path, monkeypatch) -> None:
    fake = tmp_path / "cc"
    fake.write_text("#!/bin/sh\necho 'no such flag' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("CC", str(fake))
    monkeypatch.setenv("ARMILLARY_CACHE", str(tmp_path / "cache"))
    library.cache_clear()
    try:
        assert compiler() == str(fake)
        with pytest.warns(UserWarning, match="no such flag"):
            assert library() is None
    finally:
        monkeypatch.undo()
        library.cache_clear()


def test_of_several_processes_one_compiles(tmp_path) -> None:
    """The others wait for it: each opens the lock for itself, here as threads do."""
    fake = tmp_path / "cc"
    fake.write_text(
        f"#!/bin/sh\necho once >> {tmp_path}/calls\nsleep 0.2\nfor word; do\n"
        '[ "$last" = -o ] && echo made > "$word"\nlast=$word\ndone\n'
    )
    fake.chmod(0o755)
    target = tmp_path / "kernels.so"
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda _: built(str(fake), target), range(3)))
    assert found == [None] * 3 and target.read_text() == "made\n"
    assert (tmp_path / "calls").read_text() == "once\n"


@needs_library
def test_loading_leaves_subnormal_numbers_alone() -> None:
    assert library() is not None
    assert 5e-324 / 1 == 5e-324 and 2.3e-308 / 4 > 0
    assert float(torch.tensor([1e-40]) * 1.0) > 0
