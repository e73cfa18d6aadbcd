"""The command that makes a trained model smaller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli.shared import AsJson, Device, Dtype, Folder, emit, note, open_model, table

if TYPE_CHECKING:
    import torch

    from armillary.model import Model


def compress(
    model: Folder,
    folder: Annotated[Path, typer.Argument(help="The model folder to write.")],
    prune_attention: Annotated[float, typer.Option(help="Share of the attention to mask, 0 to 1.")],
    scope: Annotated[str, typer.Option(help="Where pairs compete: in a head, a layer or the model.")] = "head",
    data: Annotated[str | None, typer.Option(help="Text to calibrate on; by default the run's training text.")] = None,
    test: Annotated[str | None, typer.Option(help="Text to measure on; by default the run's held-out text.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Windows of text to look at.")] = 64,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window; by default the context.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: AsJson = False,
) -> None:
    """Remove what a model hardly ever attends to.

    Attention weights are averaged over text by position; the smallest are masked for every input, the
    rest of the model stays. The loss is measured before and after.

    Example: armillary compress runs/demo runs/demo-pruned --prune-attention 0.25
    """
    from armillary.base.errors import InputError
    from armillary.compress import prune_attention as prune
    from armillary.evaluate import evaluate
    from armillary.model import Model, save

    if folder.exists() and any(folder.iterdir()) and not force:
        raise InputError(f"{folder} is already there", hint="choose another name, or add --force")
    opened = open_model(model, device, dtype)
    windows = _windows(opened, model, data, rows, length)
    found = prune(opened.network, windows, prune_attention, scope=scope)  # type: ignore[arg-type]
    recipe = opened.recipe
    if recipe is not None:
        recipe = recipe.derive(model=found.network.settings)
    made = Model(found.network, opened.tokenizer, recipe)
    before, after = (evaluate(each, test or model).bits_per_byte for each in (opened, made))
    save(made, folder)
    facts = {
        "removed": found.removed,
        "kept_mass": dict(found.kept_mass),
        "bits_per_byte_before": before.value,
        "bits_per_byte_after": after.value,
    }
    if json:
        emit(facts)
        return
    table(
        [
            ("attention masked", f"{found.removed:.1%}"),
            ("attention mass kept", f"{sum(found.kept_mass.values()) / len(found.kept_mass):.2%}"),
            ("bits per byte", f"{before.value:.4f} before, {after.value:.4f} after"),
        ]
    )
    note(f'wrote {folder}\nnext: armillary generate {folder} "…"')


def _windows(opened: Model, folder: str, data: str | None, rows: int, length: int | None) -> list[torch.Tensor]:
    """Windows of text as ids [B, T], drawn evenly from the run's training text or from `data`."""
    import numpy as np
    import torch

    from armillary.base.errors import InputError
    from armillary.data.corpus import Corpus
    from armillary.data.readers import Reader
    from armillary.data.settings import SourceSettings
    from armillary.evaluate import corpus_folder

    size = length or (opened.recipe.training.context if opened.recipe else opened.settings.context)
    place = corpus_folder(Path(folder))
    if data is not None:
        ids: list[int] = []
        for text, _ in Reader(SourceSettings(path=data)).documents():
            ids += opened.tokenizer.encode(text.decode("utf-8"))
            if len(ids) >= rows * size:
                break
        tokens = np.array(ids, np.int64)
        starts = np.arange(len(tokens) // size) * size
        taken: list[Any] = [tokens[start : start + size] for start in starts[:rows]]
    elif place is not None:
        store = Corpus.open(place).train
        starts = np.linspace(0, max(0, store.tokens - size), rows).astype(np.int64)
        taken = [store.read(int(start), int(start) + size) for start in np.unique(starts)]
        taken = [row for row in taken if len(row) == size]
    else:
        raise InputError(f"{folder} has no training text of its own", hint="name some with --data FILE")
    if not taken:
        raise InputError(f"the text is shorter than one window of {size} tokens", hint="give more, or a --length")
    whole = torch.from_numpy(np.stack([np.asarray(row, np.int64) for row in taken]))
    return list(whole.split(4))


COMMANDS = {"compress": compress}
