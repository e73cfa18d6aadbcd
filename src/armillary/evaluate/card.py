"""The model card of a run: what the model is and what was measured, and nothing that was not."""

from __future__ import annotations

import re
from pathlib import Path

from armillary.base.files import write_atomic
from armillary.evaluate.record import Line, Record
from armillary.evaluate.report import NAMES, baselines_of, heldout_text, number, verdict
from armillary.evaluate.words import count, duration, short, size

CARD = "card.md"


def write_card(folder: str | Path) -> Path:
    """Write card.md into a run folder from its files; returns its path.

    What is not known is said to be unknown. Raises InputError when there is nothing to tell, DataError
    for a damaged file.
    """
    record = Record.read(folder)
    sections = [
        ("Model", _model(record)),
        ("Data", _data(record)),
        ("Training", _training(record)),
        ("Evaluation", _evaluation(record)),
        ("Limits", _limits(record)),
        ("Fingerprints (sha256)", _fingerprints(record)),
        ("Licence", [_licence(record)]),
    ]
    out = [f"# {plain(record.name)}", "", "Written from the files of the run: its settings, and what was measured.", ""]
    for title, lines in sections:
        out += [f"## {title}", "", *lines, ""]
    path = record.folder / CARD
    write_atomic(path, "\n".join(out))
    return path


def plain(value: object) -> str:
    """Text that Markdown and the HTML inside it leave alone, on one line."""
    flat = " ".join(str(value).split())
    return re.sub(r"([\\`*_\[\]<>|#~&!])", r"\\\1", flat).replace("\\<", "&lt;").replace("\\&", "&amp;")


def _items(rows: list[tuple[str, str | None]]) -> list[str]:
    return [f"- {name}: {value}" for name, value in rows if value]


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    align = ["---", *["---:"] * (len(head) - 1)]
    return [f"| {' | '.join(row)} |" for row in (head, align, *rows)]


def _model(record: Record) -> list[str]:
    recipe = record.recipe
    if recipe is None:
        known = _items([("parameters", f"{record.parameters:,}" if record.parameters else None)])
        return known or ["Not known: the folder holds no recipe."]
    model = recipe.model
    kinds = []
    for block in model.layers():
        parts = [branch.mixer or branch.channel for branch in block.all()]
        kinds.append(" + ".join(part.kind for part in parts if part is not None))
    blocks = ", ".join(f"{kinds.count(kind)} × {plain(kind)}" for kind in dict.fromkeys(kinds))
    vocabulary = f"{model.vocabulary:,}" if model.vocabulary else None
    return _items(
        [
            ("form", f"{model.form.replace('_', '–')} language model"),
            ("parameters", f"{record.parameters:,}" if record.parameters else "not known"),
            ("blocks", f"{blocks}, width {model.width}"),
            ("context", f"{model.context:,} tokens, trained on sequences of {recipe.training.context:,}"),
            ("tokenizer", recipe.tokenizer.kind),
            ("vocabulary", vocabulary),
            ("objective", recipe.training.objective.kind),
        ]
    )


def _data(record: Record) -> list[str]:
    if not record.sources:
        named = [plain(source.path) for source in record.recipe.data.sources] if record.recipe else []
        if not named:
            return ["Not known."]
        return [f"Sources named by the recipe: {', '.join(named)}. What they held is not recorded in this folder."]
    rows = []
    for source in record.sources:
        r = source.record
        rows.append(
            [
                plain(r.path),
                f"{r.documents:,}",
                f"{r.bytes:,}",
                f"{source.tokens:,}",
                f"{source.heldout:,}",
                f"{r.skipped:,}",
                f"{r.empty:,}",
            ]
        )
    head = ["source", "documents", "bytes", "tokens", "held out (documents)", "skipped", "empty"]
    out = _table(head, rows)
    skipped = [name for source in record.sources for name in source.record.skipped_names]
    if skipped:
        out += ["", f"Skipped, among others: {'; '.join(plain(name) for name in skipped[:5])}."]
    return out


def _training(record: Record) -> list[str]:
    recipe = record.recipe
    settings = recipe.training if recipe is not None else None
    seconds, speed = record.last("seconds"), record.last("tokens_per_second")
    done, memory = record.steps, record.last("memory")
    steps = f"{done:,}" if done is not None else None
    if done is not None and settings is not None and done < settings.steps:
        steps = f"{done:,} of {settings.steps:,}"
    rows: list[tuple[str, str | None]] = [
        ("updates", steps),
        ("tokens", f"{record.trained_tokens:,}" if record.trained_tokens else None),
        ("time", duration(seconds) if seconds else None),
        ("peak memory", size(memory) if memory else None),
        ("speed at the end", f"{count(speed)} tokens/s" if speed else None),
    ]
    if settings is not None and recipe is not None:
        rows += [
            ("sequences in an update", f"{settings.batch} of {settings.context} tokens"),
            ("precision", settings.precision),
            ("learning rate", f"{short(settings.optimiser.learning_rate)}, {plain(settings.schedule.kind)}"),
            ("seed", str(recipe.seed)),
        ]
    rows.append(("hardware", _hardware(record.environment)))
    return _items(rows) or ["Not recorded in this folder."]


def _hardware(environment: Line | None) -> str | None:
    if not environment:
        return None
    said = [
        f"{NAMES.get(key, plain(key))} {size(value) if key == 'memory' and number(environment, key) else plain(value)}"
        for key, value in environment.items()
    ]
    return ", ".join(said)


def _evaluation(record: Record) -> list[str]:
    evaluation = record.evaluation
    value = number(evaluation, "bits_per_byte", "value")
    if evaluation is None or value is None:
        return ["Not evaluated."]
    rows = [["**this model**", f"**{value:.3f}**", _ends(evaluation, "bits_per_byte")]]
    rows += [[plain(name), f"{bits:.3f}", ""] for name, bits in baselines_of(evaluation)]
    level = number(evaluation, "bits_per_byte", "level") or 0.95
    out = _table(["held-out text", "bits per byte", f"{100 * level:.0f}% interval"], rows)
    said = f"On {heldout_text(evaluation)}"
    if evaluation.get("truncated"):
        said += " (a part of the held-out text, drawn at random)"
    out += ["", f"{said}. {plain(verdict(evaluation))}".rstrip()]
    out += ["The interval is a bootstrap over documents; it covers the choice of documents, not of the seed.", ""]
    perplexity = number(evaluation, "perplexity", "value")
    memory = number(evaluation, "peak_memory")
    writing = number(evaluation, "writing_speed")
    environment = evaluation.get("environment")
    out += _items(
        [
            (
                "perplexity per token",
                f"{short(perplexity)} ({_ends(evaluation, 'perplexity') or 'no interval'})"
                if perplexity is not None
                else None,
            ),
            ("generation, batch 1", f"{count(writing)} tokens/s" if writing else None),
            ("peak memory of the evaluation", size(memory) if memory else None),
            ("precision", plain(evaluation["precision"]) if evaluation.get("precision") else None),
            ("measured on", _hardware(environment) if isinstance(environment, dict) else None),
        ]
    )
    return out


def _ends(evaluation: Line, key: str) -> str:
    low, high = number(evaluation, key, "low"), number(evaluation, key, "high")
    return f"{low:.4g} to {high:.4g}" if low is not None and high is not None else ""


def _limits(record: Record) -> list[str]:
    """What the measurements do not show; each line holds for this run."""
    out = [
        "- Measured is how well the model predicts text like its held-out text, which comes from the same sources as "
        "its training text. Nothing is known of other text, languages or times.",
        "- Whether what it writes is true, safe, fair or useful was not measured.",
        "- Documents are held out by exact content: near copies of held-out text may be in the training text.",
        "- The model may repeat passages of its training text word for word.",
    ]
    evaluation, value = record.evaluation, number(record.evaluation, "bits_per_byte", "value")
    if evaluation is None:
        out.append("- Its quality was not measured at all.")
    documents = number(evaluation, "documents")
    if documents is not None and documents < 30:
        out.append(f"- With only {documents:.0f} held-out documents the interval is likely too narrow.")
    compared = [bits for _, bits in baselines_of(evaluation)]
    if value is not None and compared and value >= min(compared):
        out.append("- It does not beat the best baseline measured.")
    tokens, parameters = record.trained_tokens, record.parameters
    if tokens and parameters and tokens < 20 * parameters:
        out.append(
            f"- It was trained on {tokens / parameters:.1f} tokens per parameter; about 20 are usual for the best "
            "use of compute (Hoffmann et al. 2022, Training Compute-Optimal Large Language Models)."
        )
    if record.recipe is not None and record.steps is not None and record.steps < record.recipe.training.steps:
        out.append("- Training stopped before the last update of its recipe.")
    return out


def _fingerprints(record: Record) -> list[str]:
    return [f"- {plain(name)}: `{value}`" for name, value in record.fingerprints.items()] or ["None recorded."]


def _licence(record: Record) -> str:
    data = record.recipe.to_data() if record.recipe is not None else {}
    for key in ("licence", "license"):
        if data.get(key):
            return plain(data[key])
    return "Not stated."
