"""Speculative decoding with a draft a tenth the size, both trained on the same text: at least 1.5 times plain tokens/s.

The text is task-oriented dialogues with the calls of services in them. Both models see the same batches; answers go
on from the beginnings of dialogues that neither has seen. Target and draft decode natively, weights held in bf16, one
answer at a time through the engine; plain decoding takes its turns in the same run. The number of guesses is
chosen on other beginnings than those that count. The second row guesses what followed in the text so far (prompt
lookup), without a draft.
"""

from __future__ import annotations

import gzip
import json
from typing import Any

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
    campaign = begin("speculative", budget, kind=Dialogues, depth=4, head=8, precision="float32")
    for seed in campaign.seeds():
        small = campaign.train("draft", seed, draft(campaign), 3e-3)
        print(sum(p.numel() for p in small.parameters()), campaign.bits(small), flush=True)
        large = campaign.train("target", seed, target(campaign))
        print(sum(p.numel() for p in large.parameters()), campaign.bits(large), flush=True)


if __name__ == "__main__":
    main()
