"""How a model fares at other lengths than it was trained on: bits per byte of the same text, context by context.

After Press, Smith & Lewis 2022, Train Short, Test Long: a model extrapolates when its loss does not rise
beyond the trained length, and uses the longer context when it falls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from armillary.base.errors import ArmillaryError, DataError, InputError
from armillary.data.corpus import Corpus
from armillary.evaluate.heldout import held_out
from armillary.evaluate.intervals import Interval, bits_per_byte, difference
from armillary.evaluate.measure import Evaluated, Progress, default_context
from armillary.evaluate.perplexity import score_documents


@dataclass(frozen=True)
class LengthScore:
    """One length. bits_per_byte: None where the model refuses the length, and then `refused` says why;
    change: against the trained length on the same documents, None there."""

    length: int
    trained: bool
    bits_per_byte: Interval | None
    change: Interval | None
    refused: str | None = None

    def to_data(self) -> dict[str, Any]:
        return {
            "length": self.length,
            "trained": self.trained,
            "bits_per_byte": self.bits_per_byte.to_data() if self.bits_per_byte else None,
            "change": self.change.to_data() if self.change else None,
            "refused": self.refused,
        }


def evaluate_lengths(
    model: Evaluated,
    data: str | Path | Sequence[str] | Corpus,
    lengths: Sequence[int],
    *,
    limit: int | None = None,
    progress: Progress | None = None,
) -> list[LengthScore]:
    """Bits per byte of held-out text in windows of each length, the trained one always among them.

    Windows move on by half their length, so each token has at least half of it in view. Documents
    shorter than the longest length cannot tell lengths apart and are left out, unless all are.
    Raises InputError for lengths below 2 and DataError where there is no text.
    """
    if not lengths or min(lengths) < 2:
        raise InputError("a length below 2 leaves nothing to predict from", hint="for example --lengths 128,256,512")
    trained = default_context(model.network, model.recipe)
    wanted = sorted({*lengths, trained})
    held = held_out(data, model.tokenizer)
    chosen, _ = held.first(limit)
    long = [number for number in chosen if held.length(number) >= wanted[-1]]
    chosen = long or chosen
    sizes = [held.size(number) for number in chosen]
    if not sum(sizes):
        raise DataError("the held-out text is empty", where=held.name)
    nats: dict[int, list[float]] = {}
    refused: dict[int, str] = {}
    for number, length in enumerate(wanted):
        if progress is not None:
            progress(f"length {length}", number / len(wanted))
        try:
            scores = score_documents(
                model.network,
                (held.ids(i) for i in chosen),
                context=length,
                given=held.given,
                batch=max(1, 4096 // length),
            )
        except ArmillaryError as error:
            if length == trained:
                raise
            refused[length] = error.what
            continue
        nats[length] = [score.nats for score in scores]
    return [
        LengthScore(
            length,
            length == trained,
            bits_per_byte(nats[length], sizes) if length in nats else None,
            difference(nats[length], nats[trained], sizes) if length in nats and length != trained else None,
            refused.get(length),
        )
        for length in wanted
    ]
