"""The command that makes a trained model smaller, or sparser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli.shared import AsJson, Device, Dtype, Folder, emit, note, open_model, table

if TYPE_CHECKING:
    import torch

    from armillary.model import Model
    from armillary.nn.network import Network

    Made = tuple[Model, dict[str, Any], list[tuple[str, str]]]


def compress(
    model: Folder,
    folder: Annotated[Path, typer.Argument(help="The model folder to write.")],
    prune_attention: Annotated[float | None, typer.Option(help="Share of the attention to mask, 0 to 1.")] = None,
    experts: Annotated[
        int | None, typer.Option(help="Into how many experts to group the features of every feed-forward network.")
    ] = None,
    top: Annotated[int | None, typer.Option(help="Experts that a token picks; by default all.")] = None,
    scope: Annotated[str | None, typer.Option(help="Where pairs compete: head (default), layer or model.")] = None,
    data: Annotated[str | None, typer.Option(help="Text to calibrate on; by default the run's training text.")] = None,
    test: Annotated[str | None, typer.Option(help="Text to measure on; by default the run's held-out text.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Windows of text to look at.")] = 64,
    length: Annotated[int | None, typer.Option(min=2, help="Tokens in a window; by default the context.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: AsJson = False,
) -> None:
    """Prune attention, or make experts out of dense weights.

    --prune-attention: attention weights are averaged over text by position; the smallest are masked for
    every input, the rest of the model stays. --experts: the features of feed-forward networks that look
    for alike things are grouped, without new weights or training; with all experts the model is the same,
    with fewer it computes less. The loss is measured before and after.

    Example: armillary compress runs/demo runs/demo-pruned --prune-attention 0.25

    Example: armillary compress runs/demo runs/demo-experts --experts 16 --top 8
    """
    from armillary.base.errors import InputError
    from armillary.model import save

    if (prune_attention is None) == (experts is None):
        raise InputError("what is to be done?", hint="give one of --prune-attention SHARE and --experts NUMBER")
    for name, given, way in (("scope", scope, prune_attention), ("data", data, prune_attention), ("top", top, experts)):
        if given is not None and way is None:
            raise InputError(f"--{name} has no part in this", hint="leave it out")
    if folder.exists() and any(folder.iterdir()) and not force:
        raise InputError(f"{folder} is already there", hint="choose another name, or add --force")
    opened = open_model(model, device, dtype)
    if prune_attention is not None:
        windows = _windows(opened, model, data, rows, length)
        made, facts, lines = _pruned(opened, windows, prune_attention, scope or "head", test or model)
    else:
        assert experts is not None
        made, facts, lines = _split(opened, experts, top, test or model)
    save(made, folder)
    if json:
        emit(facts)
        return
    table(lines)
    note(f'wrote {folder}\nnext: armillary generate {folder} "…"')


def _pruned(opened: Model, windows: list[torch.Tensor], fraction: float, scope: str, test: str) -> Made:
    from armillary.compress import prune_attention
    from armillary.evaluate import evaluate

    found = prune_attention(opened.network, windows, fraction, scope=scope)  # type: ignore[arg-type]
    made = _model(opened, found.network)
    before, after = (evaluate(each, test).bits_per_byte.value for each in (opened, made))
    facts = {
        "removed": found.removed,
        "kept_mass": dict(found.kept_mass),
        "bits_per_byte_before": before,
        "bits_per_byte_after": after,
    }
    kept = sum(found.kept_mass.values()) / len(found.kept_mass)
    lines = [
        ("attention masked", f"{found.removed:.1%}"),
        ("attention mass kept", f"{kept:.2%}"),
        ("bits per byte", f"{before:.4f} before, {after:.4f} after"),
    ]
    return made, facts, lines


def _split(opened: Model, experts: int, top: int | None, test: str) -> Made:
    from armillary.compress import pick, split_experts
    from armillary.evaluate import evaluate

    found = split_experts(opened.network, experts, top=top)
    made = _model(opened, found.network)
    before = evaluate(opened, test).bits_per_byte.value
    picked = {}
    for share in (1.0, 0.75, 0.5, 0.25):
        pick(found.network, share)
        picked[f"{share:.0%}"] = evaluate(made, test).bits_per_byte.value
    pick(found.network, (top or experts) / experts)
    alike = sum(found.likeness.values()) / len(found.likeness)
    facts = {"likeness": dict(found.likeness), "bits_per_byte_before": before, "bits_per_byte_by_experts": picked}
    lines = [("likeness of an expert's features", f"{alike:.2f}"), ("bits per byte, dense", f"{before:.4f}")]
    lines += [(f"with {share} of the experts", f"{value:.4f}") for share, value in picked.items()]
    return made, facts, lines


def _model(opened: Model, network: Network) -> Model:
    """The network with the tokenizer and the recipe of the model that it was made from."""
    from armillary.model import Model

    recipe = opened.recipe
    if recipe is not None:
        recipe = recipe.derive(model=network.settings)
    return Model(network, opened.tokenizer, recipe)


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
