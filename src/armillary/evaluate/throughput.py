"""How fast a network reads and writes: tokens per second of whole sequences and of cached decoding."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from armillary.base.errors import UnsupportedError
from armillary.nn.network import Network


@dataclass(frozen=True)
class Throughput:
    """Tokens per second: `reading` a prompt whole, `writing` one token after another, at batch 1."""

    reading: float
    writing: float
    prompt: int
    written: int


def throughput(network: Network, *, prompt: int = 128, tokens: int = 64, seconds: float = 3.0) -> Throughput:
    """Time a prompt of `prompt` tokens and then up to `tokens` greedy ones, at most about `seconds` of them.

    One short untimed run comes first. Raises UnsupportedError for a network that does not generate.
    """
    settings = network.settings
    if settings.form != "decoder":
        raise UnsupportedError(f"a network of the form '{settings.form}' does not go on from a prompt")
    prompt = max(1, min(prompt, settings.context // 2))
    tokens = max(1, min(tokens, settings.context - prompt))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(settings.vocabulary or 1, (1, prompt), generator=generator).to(network.device)
    was_training = network.training
    network.eval()
    try:
        with torch.no_grad():
            _run(network, ids, 2, seconds)
            reading, writing, written = _run(network, ids, tokens, seconds)
    finally:
        network.train(was_training)
    return Throughput(prompt / reading, written / writing, prompt, written)


def _run(network: Network, ids: torch.Tensor, tokens: int, limit: float) -> tuple[float, float, int]:
    """(seconds for the prompt, seconds for the tokens after it, how many these are)."""
    state = network.init_state(1, ids.shape[1] + tokens)
    begin = time.perf_counter()
    token = network.extend(ids, state, last=True).argmax(-1)
    token.tolist()  # waits for an accelerator
    between = now = time.perf_counter()
    written = 0
    while written < tokens and (not written or now - between < limit):
        token = network.extend(token, state, last=True).argmax(-1)
        token.tolist()
        written += 1
        now = time.perf_counter()
    return between - begin, now - between, written
