"""Commands about runs: data, train, resume, demo."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.base.words import amount, clock
from armillary.cli.models import measure, show_evaluation
from armillary.cli.shared import AsJson, Overrides, emit, note, table, write

if TYPE_CHECKING:
    from armillary.evaluate import Evaluation
    from armillary.model import Model
    from armillary.train import Run

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a name, a file, or a run folder.", metavar="RECIPE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")]


def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option(help="Where the prepared corpus goes.")] = Path("corpus-prepared"),
    json: AsJson = False,
) -> None:
    """Prepare text for training, without training.

    Reads and splits it, learns the tokenizer, writes token shards.

    Example: armillary data quick 'data.sources=[{path: my/texts}]' --folder prepared
    """
    from armillary.data.prepare import prepare
    from armillary.recipe import Recipe
    from armillary.text import fertility
    from armillary.train import Line, Preparing

    wanted = Recipe.load(recipe, *(overrides or []))
    with Line() as line:
        corpus = prepare(
            wanted.data,
            wanted.tokenizer,
            folder,
            progress=lambda stage, fraction: line(Preparing(stage, fraction)),
        )
    some = range(min(20, len(corpus.heldout)))
    texts = (corpus.tokenizer.decode(corpus.heldout.document(index).tolist()) for index in some)
    words, per_byte = fertility(corpus.tokenizer, texts)
    facts: dict[str, Any] = {
        "folder": str(corpus.folder),
        "fingerprint": corpus.fingerprint,
        "vocabulary": corpus.tokenizer.size,
        "train": {"documents": len(corpus.train), "tokens": corpus.train.tokens},
        "heldout": {"documents": len(corpus.heldout), "tokens": corpus.heldout.tokens},
        "tokens_per_word": words,
        "tokens_per_byte": per_byte,
        "sources": [
            {
                "path": record.path,
                "documents": record.documents,
                "bytes": record.bytes,
                "skipped": record.skipped,
                "skipped_names": list(record.skipped_names),
            }
            for record in corpus.manifest.sources
        ],
    }
    if json:
        emit(facts)
        return
    rows = [
        ("corpus", facts["folder"]),
        ("vocabulary", f"{facts['vocabulary']}: {words:.2f} tokens per word, {per_byte:.3f} per byte"),
    ]
    for side in ("train", "heldout"):
        rows.append((side, f"{facts[side]['documents']} documents, {amount(facts[side]['tokens'])} tokens"))
    for source in facts["sources"]:
        left = f", {source['skipped']} skipped" if source["skipped"] else ""
        size = amount(source["bytes"], "B")
        rows.append(("source", f"{source['path']}: {source['documents']} documents, {size}{left}"))
        rows += [("", name) for name in source["skipped_names"]]
    table(rows)


def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    run: Annotated[Path | None, typer.Option(help="The run's folder; by default runs/NAME.")] = None,
    overwrite: Overwrite = False,
    json: AsJson = False,
) -> None:
    """Train a model, measure it, and write its report and card.

    Example: armillary train quick --run runs/mine 'data.sources=[{path: my/texts}]'
    """
    from armillary.recipe import Recipe
    from armillary.train import Line
    from armillary.train import train as start

    wanted = Recipe.load(recipe, *(overrides or []))
    with Line() as line:
        done = start(wanted, run, overwrite=overwrite, progress=line)
    _finish(done, json)


def resume(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Of training only, for example training.steps=4000.", metavar="[KEY=VALUE]..."),
    ] = None,
    json: AsJson = False,
) -> None:
    """Go on with a run that was stopped.

    Bit for bit as if it had not been: a run may be stopped at any moment, even with kill -9.

    Example: armillary resume runs/mine
    """
    from armillary.train import Line
    from armillary.train import resume as go_on

    with Line() as line:
        done = go_on(run, *(overrides or []), progress=line)
    _finish(done, json)


def demo(
    text: Annotated[str, typer.Argument(help="A folder of text; by default Python's own library.")] = "python:stdlib",
    run: Annotated[Path, typer.Option(help="The run's folder; what is there is replaced.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A dotted override, for example training.steps=100.")
    ] = None,
) -> None:
    """Train the quick recipe and show what it learnt.

    Ends with its bits per byte beside simple baselines, three completions and a report.

    Example: armillary demo my/texts
    """
    import json as codec

    from armillary.recipe import Recipe
    from armillary.train import Line
    from armillary.train import train as start

    begun = time.monotonic()
    wanted = Recipe.load("quick", f"data.sources=[{{path: {codec.dumps(text)}}}]", *(overrides or []))
    with Line() as line:
        done = start(wanted, run, overwrite=True, progress=line)
    _stopped(done)
    note("measuring on the held-out files and fitting the baselines")
    model, found = _measured(done, baselines=True)
    print()
    show_evaluation(found)
    prompts = wanted.training.sample_prompts or ("",)
    print("\nit writes:")
    for number in range(3):
        prompt = prompts[number % len(prompts)]
        print(f"\n--- {number + 1} ".ljust(60, "-"))
        write(prompt)
        for piece in model.generate(prompt, stream=True, max_new_tokens=80, temperature=0.7, top_p=0.95, seed=number):
            write(piece)
        print()
    print("-" * 60)
    print(f"\nreport: {done.folder / 'report.html'} (open it in a browser); all in {clock(time.monotonic() - begun)}")
    print("next:")
    print(f'  armillary generate {done.folder} "import os"')
    print(f"  armillary evaluate {done.folder} --baselines")
    print("  armillary new my.yaml && armillary train my.yaml --run runs/mine")


def _finish(run: Run, json: bool) -> None:
    """Measure a finished run and say where its things are."""
    from armillary.base.errors import UnsupportedError
    from armillary.evaluate import write_card, write_report

    _stopped(run)
    if os.environ.get("RANK", "0") != "0":
        return  # of several processes the first one measures
    note("measuring on the held-out files")
    try:
        found = _measured(run)[1]
    except UnsupportedError as error:  # an encoder, say: the run is none the worse for it
        note(f"not measured: {error.what}")
        found = None
        write_report(run.folder)
        write_card(run.folder)
    if json:
        emit({"run": str(run.folder), "evaluation": None if found is None else found.to_data()})
        return
    print()
    if found is None:
        print(f"report: {run.folder / 'report.html'}")
        return
    show_evaluation(found)
    print(f'\nreport: {run.folder / "report.html"}\nnext:   armillary generate {run.folder} "…"')


def _stopped(run: Run) -> None:
    """End here when the run was stopped before its end; it is left as it is."""
    if run.stopped:
        note(f"stopped and saved; go on with: armillary resume {run.folder}")
        raise typer.Exit(128 + run.signal if run.signal else 130)


def _measured(run: Run, *, baselines: bool = False) -> tuple[Model, Evaluation]:
    """The run's model, measured; its report and card are written."""
    from armillary.evaluate import write_card, write_report
    from armillary.model import load

    model = load(run.folder)
    found = measure(model, run.folder, baselines=baselines)
    found.save(run.folder)
    write_report(run.folder)
    write_card(run.folder)
    return model, found


COMMANDS = {"data": data, "train": train, "resume": resume, "demo": demo}
