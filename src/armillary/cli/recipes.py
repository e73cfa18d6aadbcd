"""Commands about recipes: new, show."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.base.words import amount, clock
from armillary.cli.shared import AsJson, Overrides, emit, note, table

if TYPE_CHECKING:
    from armillary.text import Tokenizer


def new(
    file: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    overrides: Overrides = None,
    base: Annotated[str, typer.Option("--from", help="The recipe to start from: a name or a file.")] = "quick",
    schema: Annotated[bool, typer.Option("--schema", help="Write the JSON Schema for editors instead.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a recipe in which every line is explained.

    Example: armillary new my.yaml model.width=384
    """
    import json

    from armillary.base.errors import InputError
    from armillary.base.files import write_atomic
    from armillary.recipe import Recipe

    if file.exists() and not force:
        raise InputError(f"{file} is already there", hint="choose another name, or add --force")
    if schema:
        write_atomic(file, json.dumps(Recipe.schema_for_editors(), indent=2))
        note(f"wrote {file}")
        return
    # called after its file, so that its runs are too
    name = file.stem.lstrip(".") or "recipe"
    recipe = Recipe.load(base, f"name={json.dumps(name)}", *(overrides or []))
    write_atomic(file, recipe.to_yaml(comments=True))
    note(f"wrote {file}\nnext: armillary show {file}\n      armillary train {file}")


def show(
    target: Annotated[str, typer.Argument(help="A recipe (name or file), or a model folder.", metavar="RECIPE")],
    overrides: Overrides = None,
    length: Annotated[int | None, typer.Option(help="Tokens per row; by default the training context.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Print the whole recipe, defaults too.")] = False,
    text: Annotated[
        list[str] | None,
        typer.Option(help="Also tokens per word and byte of this text: FILE or LANGUAGE=FILE.", metavar="FILE"),
    ] = None,
    json: AsJson = False,
) -> None:
    """What a recipe or model takes, before anything runs.

    Parameters, FLOPs per token, bytes of state, memory for training; of a model also how many tokens
    its tokenizer makes of texts in several languages (--text, repeated).

    Example: armillary show quick model.width=512 --length 2048
    """
    from armillary.nn.describe import describe
    from armillary.recipe import Recipe

    vocabulary_known, tokenizer = True, None
    if _holds_model(target) and not overrides:
        from armillary.checkpoints import load

        loaded = load(target, device="cpu")
        recipe, settings, tokenizer = loaded.recipe, loaded.network.settings, loaded.tokenizer
    else:
        recipe = Recipe.load(target, *(overrides or []))
        settings = recipe.model
        if settings.vocabulary is None:
            vocabulary_known = False
            settings = settings.derive(vocabulary=recipe.tokenizer.vocabulary)
    training = recipe.training if recipe is not None else None
    tokens = length or (training.context if training is not None else settings.context)
    rows = (training.micro_batch or training.batch) if training is not None else 1
    from armillary.train.precision import settled

    bf16 = training is None or settled(training).precision == "bf16"
    found = describe(
        settings,
        length=tokens,
        batch=rows,
        bf16=bf16,
        recompute=training is not None and training.recompute == "blocks",
    )
    data: dict[str, Any] = {
        "name": recipe.name if recipe is not None else target,
        "form": settings.form,
        "blocks": list(found.blocks),
        "driver": found.driver,
        "parameters": found.parameters,
        "active_parameters": found.active,
        "embedding_parameters": found.embedding,
        "length": tokens,
        "flops_per_token": found.flops_per_token,
        "state_bytes": found.state_bytes,
        "plain_steps": found.plain_steps,
    }
    if training is not None:
        total = training.steps * training.batch * training.context
        data |= {
            "micro_batch": rows,
            "training_memory_bytes": found.training_bytes,
            "training_tokens": total,
            "training_flops": 3 * found.flops_per_token * total,
        }
        data["estimated_training_seconds"] = data["training_flops"] / _flops_per_second(bf16)
    if tokenizer is not None:
        data["end_tokens"] = _ends(tokenizer)
    if text:
        data["fertility"] = _fertility(tokenizer, text)
    if json:
        emit(data)
        return
    if full and recipe is not None:
        print(recipe.to_yaml())
    lines = [
        ("model", f"{data['name']} ({settings.form}, width {settings.width}, depth {settings.depth})"),
        ("blocks", _runs(found.blocks)),
        *([("driver", found.driver)] if found.driver is not None else []),
        ("parameters", f"{amount(found.parameters)} ({amount(found.active)} active)"),
        ("of these", f"{amount(found.embedding)} in embedding and head"),
        ("vocabulary", f"{settings.vocabulary}{'' if vocabulary_known else ' (from tokenizer.size)'}"),
        *([("answers end at", _said(data["end_tokens"]))] if tokenizer is not None else []),
        ("FLOPs per token", f"{amount(found.flops_per_token)} forward at {tokens} tokens"),
        ("state", f"{amount(found.state_bytes, 'B')} per row after {tokens} tokens"),
        ("decoding on a CPU", _steps(found.plain_steps)),
    ]
    if training is not None:
        lines += [
            ("training memory", f"about {amount(found.training_bytes, 'B')} with {rows} rows of {tokens} tokens"),
            ("training", f"{amount(data['training_tokens'])} tokens, {amount(data['training_flops'])} FLOPs"),
            ("time here", f"about {clock(data['estimated_training_seconds'])} (from a measured product, half used)"),
        ]
    lines += [
        (f"tokens, {name}", f"{found['tokens_per_word']:.2f} per word, {found['tokens_per_byte']:.3f} per byte")
        for name, found in data.get("fertility", {}).items()
    ]
    table(lines)


def _ends(tokenizer: Tokenizer) -> dict[int, str]:
    """The tokens that end an answer, by id; one that the tokenizer does not know is empty."""
    return {id: tokenizer.decode([id], special=True) if id < tokenizer.size else "" for id in tokenizer.ends}


def _said(ends: dict[int, str]) -> str:
    return ", ".join(f"{name} ({id})".strip() for id, name in ends.items()) or "their length only"


def _fertility(tokenizer: Tokenizer | None, given: list[str]) -> dict[str, dict[str, float]]:
    """Tokens per word and per byte of every text, by its language or else the name of its file."""
    from armillary.base.errors import InputError
    from armillary.base.files import explained
    from armillary.text import fertility

    if tokenizer is None:
        raise InputError("there is no tokenizer to count tokens with", hint="--text needs the folder of a model")
    counted = {}
    for item in given:
        name, _, path = item.rpartition("=")
        file = Path(path)
        try:
            with explained("reading", file), file.open(encoding="utf-8") as lines:
                words, per_byte = fertility(tokenizer, (line.rstrip("\r\n") for line in lines))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"this text cannot be read ({error})", where=path) from None
        counted[name or file.stem] = {"tokens_per_word": words, "tokens_per_byte": per_byte}
    return counted


def _holds_model(target: str) -> bool:
    """Whether there are weights to describe; a run that has not saved any yet is described by its recipe."""
    from armillary.checkpoints import checkpoints

    folder = Path(target)
    return any((folder / name).is_file() for name in ("armillary.json", "config.json")) or bool(checkpoints(folder))


def _runs(blocks: tuple[str, ...]) -> str:
    """['a', 'b', 'a', 'b'] as '2 × (a, b)'."""
    for size in range(1, len(blocks) + 1):
        if len(blocks) % size == 0 and blocks == blocks[:size] * (len(blocks) // size):
            inner = ", ".join(blocks[:size])
            return f"{len(blocks) // size} × ({inner})"
    return ", ".join(blocks)


def _steps(plain: dict[str, str]) -> str:
    """Which branches have a native step, as the reasons why others have none."""
    if "" in plain:
        return f"plain steps: {plain['']}"
    reasons: dict[str, list[str]] = {}
    for name, why in plain.items():
        reasons.setdefault(why, []).append(name)
    shown = [
        f"{names[0]}{f' and {len(names) - 1} more' if names[1:] else ''} ({why})" for why, names in reasons.items()
    ]
    return "native steps" + (f", but for {'; '.join(shown)}" if shown else "")


def _flops_per_second(bf16: bool) -> float:
    """What half of a measured matrix product's speed gives: training reaches about that on a CPU."""
    import time

    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if bf16 else torch.float32
    best = 0.0
    for size in (256, 1024):
        a = torch.ones(size, size, dtype=dtype, device=device)
        for _ in range(4):
            start = time.perf_counter()
            float((a @ a)[0, 0])
            took = time.perf_counter() - start
            best = max(best, 2 * size**3 / took)
        if took > 0.01:  # a processor without instructions for the type: a larger product takes seconds
            break
    return 0.5 * best


COMMANDS = {"new": new, "show": show}
