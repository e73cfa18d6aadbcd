"""Commands about runs: data, train, resume, demo."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.cli.models import show_evaluation
from armillary.cli.shared import AsJson, Overrides, amount, clock, emit, note, table

if TYPE_CHECKING:
    from armillary.train import Run

RecipeArgument = Annotated[str, typer.Argument(help="A recipe: a name, a file, or a run folder.", metavar="RECIPE")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a run that is there.")]


def data(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    folder: Annotated[Path, typer.Option(help="Where the prepared corpus goes.")] = Path("corpus-prepared"),
    json: AsJson = False,
) -> None:
    """Read, split, learn the tokenizer and write token shards, without training.

    Example: armillary data quick 'data.sources=[{path: my/texts}]' --folder prepared
    """
    from armillary.data import prepare
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
    some = [corpus.text("heldout", index) for index in range(min(20, len(corpus.heldout)))]
    words, per_byte = fertility(corpus.tokenizer, some)
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
                "path": source.path,
                "documents": source.documents,
                "bytes": source.bytes,
                "skipped": source.skipped,
                "skipped_names": list(source.skipped_names),
            }
            for source in corpus.manifest.sources
        ],
    }
    if json:
        emit(facts)
        return
    rows = [
        ("corpus", facts["folder"]),
        ("vocabulary", f"{facts['vocabulary']}: {words:.2f} tokens per word, {per_byte:.3f} per byte"),
        *((side, f"{facts[side]['documents']} documents, {amount(facts[side]['tokens'])} tokens") for side in ("train", "heldout")),
    ]
    for source in facts["sources"]:
        left = f", {source['skipped']} skipped" if source["skipped"] else ""
        rows.append(("source", f"{source['path']}: {source['documents']} documents, {amount(source['bytes'], 'B')}{left}"))
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
    json: AsJson = False,
) -> None:
    """Go on with a run that was stopped, bit for bit as if it had not been.

    Example: armillary resume runs/mine
    """
    from armillary.train import Line
    from armillary.train import resume as go_on

    with Line() as line:
        done = go_on(run, progress=line)
    _finish(done, json)


def demo(
    text: Annotated[str, typer.Argument(help="A folder of text; by default Python's own library.")] = "python:stdlib",
    run: Annotated[Path, typer.Option(help="The run's folder; what is there is replaced.")] = Path("runs/demo"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="A dotted override, for example training.steps=100.")
    ] = None,
) -> None:
    """Train the quick recipe, measure it against simple baselines, and let it write.

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
    model = _measure(done, baselines=True)
    if model is None:
        return
    prompts = wanted.training.sample_prompts or ("",)
    print("\nit writes:")
    for number in range(3):
        prompt = prompts[number % len(prompts)]
        print(f"\n--- {number + 1} ".ljust(60, "-"))
        sys.stdout.write(prompt)
        for piece in model.generate(prompt, stream=True, max_new_tokens=80, temperature=0.7, top_p=0.95, seed=number):
            sys.stdout.write(piece)
            sys.stdout.flush()
        print()
    print("-" * 60)
    print(f"\nreport: {done.folder / 'report.html'} (open it in a browser); all in {clock(time.monotonic() - begun)}")
    print("next:")
    print(f'  armillary generate {done.folder} "import os"')
    print(f"  armillary evaluate {done.folder} --baselines")
    print("  armillary new my.yaml && armillary train my.yaml --run runs/mine")


def _finish(run: Run, json: bool) -> None:
    """Measure a finished run and say where its things are; a stopped one is left as it is."""
    if run.stopped:
        note(f"stopped and saved; go on with: armillary resume {run.folder}")
        raise typer.Exit(130)
    if json:
        from armillary.evaluate import evaluate, write_card, write_report
        from armillary.model import load

        found = evaluate(load(run.folder), run.folder)
        _keep(run, found)
        write_report(run.folder)
        write_card(run.folder)
        emit({"run": str(run.folder), "evaluation": found.to_data()})
        return
    _measure(run, baselines=False)
    print(f"\nreport: {run.folder / 'report.html'}\nnext:   armillary generate {run.folder} \"…\"")


def _measure(run: Run, *, baselines: bool) -> Any:
    """Evaluate on the held-out files, write report and card, show the figures; returns the model."""
    from armillary.evaluate import evaluate, write_card, write_report
    from armillary.model import load

    if run.stopped:
        note(f"stopped and saved; go on with: armillary resume {run.folder}")
        raise typer.Exit(130)
    note("measuring on the held-out files" + (" and fitting the baselines" if baselines else ""))
    model = load(run.folder)
    found = evaluate(model, run.folder, baselines=baselines)
    _keep(run, found)
    write_report(run.folder)
    write_card(run.folder)
    print()
    show_evaluation(found)
    return model


def _keep(run: Run, found: Any) -> None:
    import json

    from armillary.base.files import write_atomic

    write_atomic(run.folder / "evaluation.json", json.dumps(found.to_data(), indent=2))


COMMANDS = {"data": data, "train": train, "resume": resume, "demo": demo}
