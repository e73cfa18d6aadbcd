"""Commands about models: evaluate, generate, detect, chat, embed, classify, export, import."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from armillary.base.words import amount
from armillary.cli.engine import Guess, Guesses, Kv, Policy, checked, drafter, warn_lossy
from armillary.cli.shared import (
    AsJson,
    Device,
    Dtype,
    Folder,
    KeyFile,
    MarkKind,
    Weights,
    emit,
    note,
    open_model,
    read_text,
    refuse_unused,
    table,
    watermark_of,
    write,
)

if TYPE_CHECKING:
    from armillary.evaluate import Evaluation
    from armillary.model import Model

Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
Tokens = Annotated[int, typer.Option("--tokens", "-n", help="At most this many new tokens.")]
TopK = Annotated[int | None, typer.Option(help="Keep the k likeliest tokens.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens that make up p.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least this share as likely as the likeliest.")]
Penalty = Annotated[float, typer.Option("--repetition-penalty", help="Above 1: repeat less.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the completion; may be repeated.")]
Url = Annotated[str | None, typer.Option(help="A server that answers instead, with /v1; MODEL is then its name there.")]
THERE = "with --url the server decides that"
Seed = Annotated[int, typer.Option(help="Seed of the draws.")]
Width = Annotated[int | None, typer.Option("--beams", help="Search for the likeliest text with so many beams.", min=1)]
LengthPenalty = Annotated[float, typer.Option(help="Of the search: above 0 favours long texts.")]


def evaluate(
    model: Folder,
    data: Annotated[str | None, typer.Option(help="Text to measure on; by default the run's held-out files.")] = None,
    baselines: Annotated[bool, typer.Option("--baselines", help="Measure the simple baselines beside it.")] = False,
    order: Annotated[int, typer.Option(help="Order of the n-gram model (Kneser-Ney) among the baselines.")] = 5,
    limit: Annotated[int | None, typer.Option(help="At most this many documents.")] = None,
    lengths: Annotated[
        str | None, typer.Option(help="Other context lengths to measure at instead, for example 128,512,2048.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: AsJson = False,
) -> None:
    """Measure a model on held-out text.

    Bits per byte and perplexity with 95% intervals, speed, memory, and simple baselines beside them;
    with --lengths, how the model fares with less and more context than it was trained on.

    Example: armillary evaluate runs/demo --baselines
    """
    from armillary.base.errors import InputError
    from armillary.evaluate import corpus_folder

    opened = open_model(model, device, dtype)
    if data is None and corpus_folder(Path(model)) is None:
        raise InputError(f"{model} has no held-out text of its own", hint="name some with --data FILE")
    if lengths is not None:
        if baselines:
            raise InputError("baselines have no context length", hint="leave out --baselines or --lengths")
        _lengths(opened, data or model, lengths, limit, json)
        return
    found = measure(opened, data or model, baselines=baselines, order=order, limit=limit)
    if json:
        emit(found.to_data())
        return
    show_evaluation(found)


def _lengths(model: Model, data: str | Path, lengths: str, limit: int | None, json: bool) -> None:
    """Bits per byte at each length, the trained one among them."""
    from armillary.base.errors import InputError
    from armillary.evaluate import evaluate_lengths
    from armillary.train import Line, Preparing

    try:
        wanted = [int(part) for part in lengths.split(",")]
    except ValueError:
        raise InputError(f"'{lengths}' are no lengths", hint="numbers with commas, for example 128,512") from None
    with Line() as line:
        found = evaluate_lengths(
            model, data, wanted, limit=limit, progress=lambda stage, fraction: line(Preparing(stage, fraction))
        )
    if json:
        emit([one.to_data() for one in found])
        return
    rows = [("length", "bits per byte", "", "against the trained length")]
    for one in found:
        bits = one.bits_per_byte
        spread = "" if bits is None or bits.low is None else f"[{bits.low:.4f}, {bits.high:.4f}]"
        change = "trained on" if one.trained else f"{one.change}" if one.change else f"refused: {one.refused}"
        rows.append((f"{one.length:,}", f"{bits.value:.4f}" if bits else "–", spread, change))
    table(rows)


def measure(model: Model, data: str | Path, **options: Any) -> Evaluation:
    """What `evaluate` finds, its progress shown meanwhile."""
    from armillary.evaluate import evaluate as run
    from armillary.train import Line, Preparing

    with Line() as line:
        return run(model, data, progress=lambda stage, fraction: line(Preparing(stage, fraction)), **options)


def show_evaluation(found: Evaluation) -> None:
    """The measured figures as a table."""
    bits = found.bits_per_byte
    spread = "" if bits.low is None or bits.high is None else f"[{bits.low:.4f}, {bits.high:.4f}]"
    table(
        [
            ("bits per byte", f"{bits.value:.4f}", spread, "this model, held-out text"),
            *(("", f"{one.bits_per_byte:.4f}", "", one.name) for one in found.baselines),
        ]
    )
    speeds = [("scoring", found.tokens_per_second), ("reading", found.reading_speed), ("writing", found.writing_speed)]
    table(
        [
            ("perplexity", f"{found.perplexity} per token"),
            ("measured on", f"{found.documents} documents, {amount(found.bytes, 'B')}"),
            ("tokens/s", ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds if speed is not None)),
            ("peak memory", amount(found.peak_memory, "B")),
        ]
    )


def generate(
    model: Folder,
    prompt: Annotated[str | None, typer.Argument(help="The text to go on from; - or nothing reads a pipe.")] = None,
    tokens: Tokens = 128,
    temperature: Temperature = 0.8,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    seed: Seed = 0,
    beams: Width = None,
    length_penalty: LengthPenalty = 1.0,
    watermark: KeyFile = None,
    watermark_kind: MarkKind = "gumbel",
    url: Url = None,
    adapter: Annotated[Path | None, typer.Option(help="A LoRA folder as peft saves it, on top of the model.")] = None,
    capacity: Annotated[
        int | None, typer.Option(help="Most tokens of prompt and answer; by default the model's context.", min=2)
    ] = None,
    guess: Guess = False,
    draft: Annotated[
        str | None, typer.Option(help="A small model with the same vocabulary, to guess tokens.", metavar="FOLDER")
    ] = None,
    guesses: Guesses = None,
    kv: Kv = None,
    cache: Policy = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    json: AsJson = False,
) -> None:
    """Let a model write on from a prompt.

    The answer ends where the model's context does, unless --capacity says otherwise. With --url a server writes; its
    key comes from ARMILLARY_API_KEY.

    Example: armillary generate runs/demo "def main(" --tokens 64
    """
    text = read_text(prompt)
    if beams is None and length_penalty != 1.0:
        refuse_unused({"--length-penalty": length_penalty}, "it goes with --beams")
    ahead = {"--guess": guess, "--draft": draft, "--guesses": guesses, "--kv": kv, "--cache": cache}
    if url is not None:
        from armillary.cli.remote import generated

        ours = {"--beams": beams, "--watermark": watermark, "--adapter": adapter, "--capacity": capacity} | ahead
        refuse_unused(ours | _changed(weights=weights, device=device, dtype=dtype), THERE)
        asked: dict[str, Any] = {"max_tokens": tokens, "temperature": temperature, "seed": seed}
        given = {"top_p": top_p, "top_k": top_k, "min_p": min_p, "stop": stop}
        asked |= {name: value for name, value in given.items() if value is not None}
        asked |= {} if repetition_penalty == 1 else {"repetition_penalty": repetition_penalty}
        pieces = generated(url, model, text, asked)
        if json:
            emit({"prompt": text, "text": "".join(pieces)})
            return
        _shown(text, pieces)
        return
    if beams is not None:
        refuse_unused(ahead, "a search with --beams neither guesses nor takes a cache")
    kept = checked(kv, cache, guess, draft is not None, guesses)
    opened = open_model(model, device, dtype, mapped=True)
    opened = opened if adapter is None else opened.adapted(adapter)
    left = room(opened, text, capacity)
    options: dict[str, Any] = {
        "max_new_tokens": min(tokens, left),
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "stop": tuple(stop or ()),
        "seed": seed,
        "watermark": None if watermark is None else watermark_of(watermark, watermark_kind),
        "weights": weights,
        "cache": kept,
        "drafter": drafter(opened, guess, draft, guesses, 1, device, dtype, weights),
    }
    warn_lossy(cache)
    if beams is not None:  # what only draws know is refused where it was given
        defaults = {"temperature": 0.8, "repetition_penalty": 1.0, "seed": 0, "stop": (), "weights": "auto"}
        options = {name: value for name, value in options.items() if value not in (None, defaults.get(name))}
        options |= {"beams": beams, "length_penalty": length_penalty}
    if json or beams is not None:
        done = opened.generate(text, **options)
        finish = done.finish
        if json:
            fields = {"text": done.text, "ids": done.ids, "logprobs": done.logprobs, "finish": finish}
            emit({"prompt": text, **fields})
        else:
            _shown(text, [done.text])
    else:
        finish = None

        def told() -> Iterator[str]:
            nonlocal finish
            for piece in opened.generate([text], stream=True, **options):
                finish = piece.finish
                yield piece.text

        _shown(text, told())
    if finish == "length" and left < tokens:
        note(cut(left, capacity or opened.settings.context))


def room(model: Model, prompt: Any, capacity: int | None = None) -> int:
    """Tokens that an answer may have. Raises InputError when the prompt (or conversation) alone fills the context."""
    from armillary.base.errors import InputError

    left = model.room(prompt, capacity)
    if left < 1:
        most = capacity or model.settings.context
        raise InputError(
            f"the prompt has {most - left} tokens, and {most} is the most, answer included",
            hint="shorten it" if capacity is None else "shorten it, or raise --capacity",
        )
    return left


def cut(left: int, most: int) -> str:
    """What is said of an answer that ended at the end of the context."""
    return f"ended after {left} tokens: with the prompt they fill the context of {most}"


def _changed(**options: str) -> dict[str, str]:
    """Those that are not left at auto, by their names on the command line."""
    return {f"--{name}": value for name, value in options.items() if value != "auto"}


def _shown(text: str, pieces: Iterable[str]) -> None:
    first = next(iterator := iter(pieces), "")  # a server that refuses does so before anything is shown
    write(text + first)
    for piece in iterator:
        write(piece)
    print()


def detect(
    model: Folder,
    text: Annotated[str | None, typer.Argument(help="The text in question; - or nothing reads a pipe.")] = None,
    watermark: KeyFile = None,
    watermark_kind: MarkKind = "gumbel",
    json: AsJson = False,
) -> None:
    """Whether a text carries a watermark.

    Prints z, and p: how probable as many marks are by chance.

    The model is the one whose tokens the text was written in; the key is in the file, or in the
    environment's ARMILLARY_WATERMARK_KEY.

    Example: armillary detect runs/demo "a text" --watermark key.txt
    """
    from dataclasses import asdict

    from armillary.engine.watermark import detect as run

    mark = watermark_of(watermark, watermark_kind)
    found = run(read_text(text), mark, open_model(model, "cpu", "auto").tokenizer)
    if json:
        emit(asdict(found))
        return
    table([("z", f"{found.z:.2f}"), ("p", f"{found.p:.3g}"), ("counted", f"{found.counted} of {found.tokens} tokens")])


def chat(
    model: Folder,
    system: Annotated[str | None, typer.Option(help="What the model is told first.")] = None,
    tokens: Tokens = 256,
    temperature: Temperature = 0.7,
    seed: Seed = 0,
    url: Url = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Talk to a model through its chat template.

    An empty line or Ctrl-D ends it. With --url a server answers; its key comes from ARMILLARY_API_KEY.

    Example: armillary chat runs/demo --system "Answer briefly."
    """
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    answers: Callable[..., Iterable[str]]
    opened: Model | None = None
    limit: dict[str, Any] = {}  # with --url, the server's
    if url is not None:
        from armillary.cli.remote import said

        refuse_unused(_changed(device=device, dtype=dtype), THERE)
        options = {"max_tokens": tokens, "temperature": temperature, "seed": seed}
        answers = partial(said, url, model, options=options)
    else:
        opened = open_model(model, device, dtype, mapped=True)
        opened.tokenizer.chat([*messages, {"role": "user", "content": ""}])  # refuse now what has no template
        answers = partial(opened.chat, stream=True, temperature=temperature, seed=seed)
    while True:
        try:
            words = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if not words.strip():
            return
        messages.append({"role": "user", "content": words})
        answer = ""
        if opened is not None:
            left = room(opened, messages)
            if left < tokens:
                note(f"there is room for {left} more tokens in the context of {opened.settings.context}")
            limit = {"max_new_tokens": min(tokens, left)}
        for piece in answers(messages, **limit):
            answer += piece
            write(piece)
        print()
        messages.append({"role": "assistant", "content": answer})


def embed(
    model: Folder,
    texts: Annotated[list[str] | None, typer.Argument(help="Texts; none reads lines from a pipe.")] = None,
    pool: Annotated[str, typer.Option(help="mean, first or last.")] = "mean",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """One vector per text, as JSON lines.

    Example: armillary embed runs/demo "a first text" "another"
    """
    import json as codec

    many = texts or [line for line in read_text(None).splitlines() if line]
    vectors = open_model(model, device, dtype).embed(many, pool=pool)  # type: ignore[arg-type]  # it says what it takes
    for text, vector in zip(many, vectors, strict=True):
        print(codec.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False))


def classify(
    model: Folder,
    text: Annotated[str, typer.Argument(help="The text.")],
    label: Annotated[list[str] | None, typer.Option(help="A label to choose from; repeat it.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: AsJson = False,
) -> None:
    """Which class a text belongs to, with probabilities.

    Example: armillary classify runs/demo "import os" --label " # python" --label " // C"
    """
    found = open_model(model, device, dtype).classify(text, label)
    if json:
        emit(found)
        return
    table((name, f"{share:.3f}") for name, share in sorted(found.items(), key=lambda item: -item[1]))


def export(
    model: Folder,
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    layout: Annotated[str, typer.Option(help="open: what other tools read; native: ours.")] = "open",
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Write a model in the common open layout (or ours).

    Example: armillary export runs/demo exported
    """
    _rewrite(model, folder, layout, force, dtype)


def import_(
    model: Annotated[str, typer.Argument(help="A folder in an open layout, or a hub name.", metavar="MODEL")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    revision: Annotated[str | None, typer.Option(help="Revision of a hub name.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
    dtype: Dtype = "auto",
) -> None:
    """Turn an open checkpoint into one of ours.

    Every tensor is checked against what the model needs.

    Example: armillary import downloads/some-llama models/mine
    """
    _rewrite(model, folder, "native", force, dtype, revision)


def _rewrite(model: str, folder: Path, layout: str, force: bool, dtype: str, revision: str | None = None) -> None:
    from armillary.base.errors import InputError
    from armillary.model import save

    if folder.exists() and any(folder.iterdir()) and not force:
        raise InputError(f"{folder} is already there", hint="choose another name, or add --force")
    save(open_model(model, "cpu", dtype, revision), folder, layout=layout)
    note(f'wrote {folder}\nnext: armillary generate {folder} "…"')


COMMANDS = {
    "evaluate": evaluate,
    "generate": generate,
    "detect": detect,
    "chat": chat,
    "embed": embed,
    "classify": classify,
    "export": export,
    "import": import_,
}
