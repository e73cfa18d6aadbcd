"""Unset taps cost nothing: the captured graphs equal those of a build without taps, character for character."""

from __future__ import annotations

import ast
import inspect
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

import armillary.nn.network as real
from armillary.base.settings import parse
from armillary.nn import block, chunks, mechanism, reversible, stack
from armillary.nn.context import Context
from armillary.nn.mixers import attention, retention
from armillary.nn.taps import Taps
from armillary.testing.untapped import Untapped, untapped

KINDS = {
    "attention": {"mixer": {"kind": "attention", "kv_heads": 2, "position": "rope"}, "channel": "gated"},
    "alibi": {"mixer": {"kind": "attention", "position": "alibi", "softcap": 5.0}, "channel": "ffn"},
    "retention": {"mixer": "retention", "channel": "gated"},
}


def captured(module: ModuleType, kind: str) -> tuple[Any, list[str]]:
    """The network, and the code of the graphs of its first block: as traced, forward and backward."""
    data = {"width": 16, "depth": 1, "vocabulary": 20, "block": KINDS[kind]}
    network = module.build(parse(module.ModelSettings, data))
    texts: list[str] = []

    def lowered(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        texts.append(graph.code)
        return make_boxed_func(graph.forward)

    def traced(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        texts.append(graph.code)
        return aot_autograd(fw_compiler=lowered, bw_compiler=lowered)(graph, inputs)

    torch._dynamo.reset()
    try:
        first = torch.compile(next(iter(network.blocks)), backend=traced, fullgraph=True)
        first(torch.randn(2, 6, 16, requires_grad=True), Context()).sum().backward()
    finally:
        torch._dynamo.reset()
    return network, texts


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_that_of_a_build_without_taps(kind: str) -> None:
    tapped, ours = captured(real, kind)
    with untapped() as bare:
        stripped, theirs = captured(bare, kind)
    assert type(stripped) is not type(tapped), "the same build was compared with itself"
    assert len(ours) == 3 and all(len(text) > 200 for text in ours)
    assert ours == theirs


def test_the_bare_build_computes_the_same_and_passes_no_tap() -> None:
    data = {"width": 16, "depth": 2, "vocabulary": 20, "block": KINDS["retention"]}
    ids = torch.randint(0, 20, (2, 9))
    network = real.build(parse(real.ModelSettings, data))
    with untapped() as bare:
        stripped = bare.build(parse(bare.ModelSettings, data))
        stripped.load_state_dict(network.state_dict())
        torch.testing.assert_close(stripped(ids), network(ids), rtol=0, atol=0)
        seen = Taps(["*"])
        stripped(ids, taps=seen)
        assert len(seen.seen) == 0
    network(ids, taps=seen)
    assert len(seen.seen) > 20


def test_the_real_build_is_back_afterwards() -> None:
    before = {name: module for name, module in sys.modules.items() if name.startswith("armillary.")}
    with untapped() as bare:
        assert sys.modules["armillary.nn.network"] is bare is not real
    with pytest.raises(ZeroDivisionError), untapped():
        raise ZeroDivisionError
    after = {name: module for name, module in sys.modules.items() if name in before}
    assert after == before
    import armillary

    assert armillary.nn.network is real  # type: ignore[attr-defined]


@pytest.mark.parametrize("module", [mechanism, block, stack, real, attention, retention, chunks, reversible])
def test_every_test_of_taps_is_removed(module: ModuleType) -> None:
    transform = Untapped()
    text = ast.unparse(transform.visit(ast.parse(inspect.getsource(module))))
    assert transform.removed > 0
    assert "taps is " not in text
    assert inspect.getsource(module).count("taps is ") == transform.removed


def test_only_what_can_never_run_is_dropped() -> None:
    source = """
if ctx.taps is not None:
    a()
elif b:
    c()
if taps is None:
    d()
else:
    e()
f = g if taps is None else taps("x", g)
if h or ctx.taps is not None:
    i()
if j and ctx.taps is not None and k:
    m()
if n is not None:
    o()
"""
    expected = "if b:\n    c()\nd()\nf = g\nif h:\n    i()\npass\nif n is not None:\n    o()"
    assert ast.unparse(Untapped().visit(ast.parse(source))) == expected
