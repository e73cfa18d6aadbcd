"""Speculative decoding with a draft a tenth the size, both trained on the same text: at least 1.5 times plain tokens/s.

The text is task-oriented dialogues with the calls of services in them. Both models see the same batches; answers go
on from the beginnings of dialogues that neither has seen. Target and draft decode natively, one answer at a time
through the engine; plain decoding takes its turns in the same run. The goal is for weights as they are held by default,
which is what was trained, in float32; with weights in bf16 steps of models of this size are so short that what stands
between them counts. The number of guesses is chosen on other beginnings than those that count. The second row guesses
what followed in the text so far (prompt lookup), without a draft.
"""

from __future__ import annotations

import gzip
import json
import statistics
import time
from typing import Any

import torch
from paired import ROOT, Budget, Campaign, begin, texts


class Dialogues(Campaign):
    """The campaign's text: dialogues, of which some are held out by their content."""

    def _corpus(self) -> Any:
        from armillary.data.prepare import prepare
        from armillary.data.settings import DataSettings, SourceSettings
        from armillary.text import TokenizerSettings

        size, mark = self.budget.vocabulary, "-tiny" if self.tiny else ""
        place = ROOT / "runs" / "campaigns" / f"dialogues-{size}{mark}"
        place.mkdir(parents=True, exist_ok=True)
        file = place / "train.jsonl"
        if not file.exists():
            with gzip.open(texts("sgd") / "sgd" / "train.jsonl.gz", "rt", encoding="utf-8") as lines:
                said = [json.dumps({"text": told(json.loads(line))}) for line in lines]
            file.write_text("\n".join(said[:100] if self.tiny else said) + "\n", encoding="utf-8")
        self.data = DataSettings(sources=(SourceSettings(path=str(file)),), heldout=0.1)
        return prepare(self.data, TokenizerSettings(kind="bpe", size=size), place / "corpus")


def told(dialogue: dict[str, Any]) -> str:
    """A dialogue as text: who says what, and each call of a service before what is said of its results."""
    lines = []
    for turn in dialogue["turns"]:
        for frame in turn["frames"]:
            if call := frame.get("service_call"):
                given = ", ".join(f"{name}={value}" for name, value in call["parameters"].items())
                lines.append(f"CALL: {call['method']}({given})")
        lines.append(f"{turn['speaker']}: {turn['utterance']}")
    return "\n".join(lines)


def target(campaign: Campaign) -> dict[str, Any]:
    spent = campaign.budget
    return shape(campaign, spent.width, spent.depth, spent.width * 11 // 4)


def draft(campaign: Campaign) -> dict[str, Any]:
    """A tenth of the target's parameters, in few layers: a step waits for each."""
    return shape(
        campaign, campaign.budget.width // 2, max(1, campaign.budget.depth * 3 // 10), campaign.budget.width * 5 // 4
    )


def shape(campaign: Campaign, width: int, depth: int, hidden: int) -> dict[str, Any]:
    heads = width // campaign.budget.head
    mixer = {"kind": "attention", "heads": heads, "kv_heads": heads // 2, "position": "rope"}
    model = campaign.model(width=width, depth=depth)
    return model | {"block": {"mixer": mixer, "channel": {"kind": "gated", "hidden": hidden}}}


class Way:
    """Tokens by one engine, one answer at a time: plainly, or with guesses."""

    def __init__(self, network: Any, weights: str, drafter: Any = None) -> None:
        from armillary.engine.core import Engine

        self.engine = Engine(network, slots=1, keep=False, weights=weights, drafter=drafter)  # type: ignore[arg-type]
        self.drafted = self.accepted = 0

    def __call__(self, prompt: list[int], tokens: int, temperature: float) -> tuple[list[int], float, float]:
        """The tokens; tokens/s from the first on, which is when a draft begins to read; those of the whole request."""
        from armillary.engine.request import Request
        from armillary.engine.sampling import Sampling

        sampling = Sampling(max_new_tokens=tokens, temperature=temperature, seed=1)
        answer = self.engine.submit(Request(tuple(prompt), sampling)).wait()
        self.drafted, self.accepted = self.drafted + answer.drafted, self.accepted + answer.accepted
        found = [choice.token for choice in answer.choices]
        assert len(found) == tokens
        return (
            found,
            (tokens - 1) / (answer.done_at - answer.first_at),
            tokens / (answer.done_at - answer.submitted),
        )


def prompts(campaign: Campaign, count: int, length: int) -> list[list[int]]:
    """Beginnings of held-out dialogues."""
    store = campaign.corpus.heldout
    long = [number for number in range(len(store)) if len(store.document(number)) >= 2 * length]
    step = len(long) / count
    return [store.document(long[int(place * step)])[:length].tolist() for place in range(count)]


def best(plain: Way, ways: dict[str, Way], beginnings: list[list[int]], tokens: int) -> tuple[str, dict[str, float]]:
    """The way with the highest median ratio to plain decoding, and the ratio of each."""
    ratios: dict[str, list[float]] = {name: [] for name in ways}
    for round_, prompt in enumerate([beginnings[0], *beginnings]):
        _, base, _ = plain(prompt, tokens, 0)
        for name, way in ways.items():
            _, speed, _ = way(prompt, tokens, 0)
            if round_:  # the first warms up
                ratios[name].append(speed / base)
    found = {name: statistics.median(each) for name, each in ratios.items()}
    return max(found, key=found.__getitem__), found


def steps(network: Any, weights: Any, prompt: list[int], count: int, repeats: int) -> float:
    """Seconds of a step of `count` tokens of one sequence, their scores all wanted."""
    from armillary.engine.slots import Slots

    slots = Slots(network, 1, network.settings.context, weights=weights)
    slots.extend([0], [prompt])
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        slots.extend([0], [prompt[:count]], last=count == 1)
        times.append(time.perf_counter() - start)
        slots.go_back(0, len(prompt), {})
    return statistics.median(times)


def measured(
    campaign: Campaign, large: Any, small: Any, weights: Any
) -> tuple[dict[str, Any], dict[str, tuple[float, str]]]:
    from armillary.engine.drafts import DraftModel, PromptLookup

    context = campaign.budget.context
    length, tokens, count = context // 4, context * 3 // 8, 4 if campaign.tiny else 16
    given = prompts(campaign, count + 4, length)
    chosen_on, counted = given[::5][:4], [prompt for place, prompt in enumerate(given) if place % 5 or place >= 20]
    figures: dict[str, Any] = {}
    plain = Way(large, weights)
    drafts = {f"{number} guesses": Way(large, weights, DraftModel(small, number, rows=1)) for number in (4, 6, 8)}
    lookups = {f"{number} guesses": Way(large, weights, PromptLookup(number, shortest=1)) for number in (2, 4, 6)}
    ways: dict[str, Way] = {}
    for kind, among in (("draft", drafts), ("prompt lookup", lookups)):
        name, ratios = best(plain, among, chosen_on, tokens)
        figures |= {f"chosen on other text, {kind}, {each}: times plain": value for each, value in ratios.items()}
        ways[f"{kind}, {name}"] = among[name]
    reach: dict[str, tuple[float, str]] = {}
    for temperature, mode in ((0.0, "greedy"), (1.0, "sampled")):
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        wholes: dict[str, list[float]] = {name: [] for name in ways}
        same, bases = dict.fromkeys(ways, 0), []
        for way in ways.values():
            way.drafted = way.accepted = 0
        for prompt in counted:
            expected, base, whole = plain(prompt, tokens, temperature)
            bases.append(base)
            for name, way in ways.items():
                found, speed, of_all = way(prompt, tokens, temperature)
                speeds[name].append(speed / base)
                wholes[name].append(of_all / whole)
                same[name] += found == expected
        figures[f"{mode}, plain: tokens/s"] = statistics.median(bases)
        for name, way in ways.items():
            kind = name.partition(",")[0]
            figures[f"{mode}, {name}: times plain"] = statistics.median(speeds[name])
            figures[f"{mode}, {name}: times plain, prompt read included"] = statistics.median(wholes[name])
            figures[f"{mode}, {kind}: guesses that were right"] = way.accepted / max(1, way.drafted)
            figures[f"{mode}, {kind}: answers as without guesses"] = same[name] / len(counted)
            reach[f"{mode}, {kind}: answers as without guesses"] = (1.0, "min")
            if kind == "draft" and mode == "greedy":
                reach[f"{mode}, {name}: times plain"] = (1.5, "min")
    one = steps(large, weights, counted[0], 1, 40)
    figures["a step of the target, ms"] = 1000 * one
    for number in (3, 5, 7, 9):
        figures[f"a step of {number} tokens over one"] = steps(large, weights, counted[0], number, 40) / one
    figures["a step of the draft over one of the target"] = steps(small, weights, counted[0], 1, 40) / one
    return figures, reach


def main() -> None:
    budget = Budget(
        width=512,
        depth=10,
        context=256,
        batch=8,
        steps=500,
        rate=1e-3,
        vocabulary=4096,
        seeds=1,
        head=64,
        precision="bf16",
    )
    campaign = begin("speculative", budget, kind=Dialogues, context=128, depth=4, head=8, precision="float32")
    small = campaign.train("draft", 1, draft(campaign), 3e-3)
    large = campaign.train("target", 1, target(campaign))
    parameters = [sum(p.numel() for p in network.parameters()) for network in (large, small)]
    with torch.no_grad():
        figures = {
            "target, million parameters": parameters[0] / 1e6,
            "draft, times smaller": parameters[0] / parameters[1],
            "target: held-out bits per byte": campaign.bits(large),
            "draft: held-out bits per byte": campaign.bits(small),
        }
        found, reach = measured(campaign, large, small, "auto")
        halved, _ = measured(campaign, large, small, "bf16")
    campaign.record(figures | found | {f"weights in bf16: {name}": value for name, value in halved.items()}, reach)


if __name__ == "__main__":
    main()
