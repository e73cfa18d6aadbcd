"""Tiny models of `transformers` and how ours are compared with them, both ways."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from armillary.checkpoints import load, save_open
from armillary.checkpoints.facts import facts
from armillary.nn.network import Network
from armillary.nn.state import State
from armillary.nn.taps import Taps

transformers = pytest.importorskip("transformers")
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

Measured = dict[str, dict[str, dict[str, float]]]  # by family, variant and figure

VOCABULARY, CONTEXT, TOKENS = 107, 96, 64
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 76,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
}
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 40,
    "n_layer": 3,
    "n_head": 5,
    "n_inner": 92,
    "n_positions": CONTEXT,
}


def stirred(peer: Any, gain: float = 1.0) -> Any:
    """With weights far from their start, so that every one of them counts; gain: what those of norms lie around."""
    generator = torch.Generator().manual_seed(7)
    for parameter in peer.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * 0.15
        parameter.data = noise + (gain if parameter.dim() == 1 else 0)
    return peer.eval()


def tokens(rows: int = 2, length: int = 60, *, least: int = 0, seed: int = 1) -> torch.Tensor:
    return torch.randint(least, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


class Seen(Taps):
    """The residual stream before every block, and what the last norm gives."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[torch.Tensor] = []

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        if name == "norm" or name.endswith(".residual.pre"):
            self.found.append(value)
        return value


def share(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> float:
    """The largest difference from the second of each pair, as a share of its largest number (if above 1)."""
    return max(float((a - b).abs().max() / b.abs().max().clamp(min=1)) for a, b in pairs)


@torch.no_grad()
def greedy(network: Network, state: State, given: torch.Tensor, theirs: list[int], close: float) -> tuple[int, int]:
    """How many greedy tokens after `given` [1, T] are theirs, and 1 if two best logits that nearly tied end it."""
    for step, token in enumerate(theirs):
        logits = network.extend(given, state, last=True)[0, -1]
        best = logits.topk(2).values
        if best[0] - best[1] < close:
            return step, 1
        assert int(logits.argmax()) == token, f"token {step}"
        given = torch.tensor([[token]])
    return len(theirs), 0


def in_and_out(
    folder: Path,
    family: str,
    peer: Any,
    half: bool,
    read: Callable[..., Any],
    compare: Callable[[Network, Any], tuple[float, float]],
    own: Callable[[Path], dict[str, torch.Tensor]] = weights,
) -> tuple[Network, Any, dict[str, float]]:
    """The peer through our files and back: the network and the peer in float32, and how far they are apart.

    half: whether it is stored in bf16; read: theirs from a folder; compare: the differences of logits and
    of hidden states; own: the tensors of a folder that are the network's.
    """
    (peer.bfloat16() if half else peer).save_pretrained(folder / "theirs", max_shard_size="30KB")
    loaded = load(folder / "theirs", "cpu")
    kept = network = loaded.network
    if half:
        # read anew: casting a whole model to bf16 rounds their rotary frequencies too
        assert {one.dtype for one in kept.parameters()} == {torch.bfloat16} and kept.dtype == torch.bfloat16
        network, peer = load(folder / "theirs", "cpu", "float32").network, _again(read, folder / "theirs")
    network.check_ties()
    save_open(folder / "ours", kept, family=family, max_shard=25_000)
    again = _again(read, folder / "ours")
    assert type(again) is type(peer)
    for name in ("theirs", "ours"):
        assert len(list((folder / name).glob("model-*.safetensors"))) > 1
    theirs, ours = own(folder / "theirs"), own(folder / "ours")
    assert set(theirs) == set(ours)
    assert all(theirs[key].dtype == ours[key].dtype and torch.equal(theirs[key], ours[key]) for key in theirs)
    assert facts(load(folder / "ours", "cpu").network.settings) == facts(kept.settings)
    assert loaded.recipe is not None and loaded.recipe.model == kept.settings and loaded.recipe.name == "theirs"
    logits, hidden = (max(both) for both in zip(compare(network, peer), compare(network, again), strict=True))
    assert logits < 1e-4 and hidden < 1e-4
    return network, peer, {"logits": logits, "hidden": hidden}


def _again(read: Callable[..., Any], folder: Path) -> Any:
    return read(folder, attn_implementation="eager", dtype=torch.float32).eval()


def measuring(file: Path, cases: Mapping[tuple[str, str], Any]) -> Iterator[Measured]:
    """A place for what is measured in all cases, which is written to `file` when ARMILLARY_MEASURE is set."""
    found: Measured = {}
    yield found
    if os.environ.get("ARMILLARY_MEASURE"):
        assert sum(map(len, found.values())) == len(cases), "measure all cases in one process"
        data = {"transformers": transformers.__version__, "families": found}
        file.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
