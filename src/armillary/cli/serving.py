"""`armillary serve`: models over HTTP."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from armillary.cli.engine import Guess, Guesses, Kv, Policy, checked, drafter, warn_lossy
from armillary.cli.shared import Device, Dtype, KeyFile, MarkKind, Weights, note

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from armillary.nn.network import ModelSettings
    from armillary.server.hosted import Hosted
    from armillary.server.tracing import Tracing

KEYS = "ARMILLARY_API_KEYS"


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(help="Run folders, model folders or hub names; NAME=FOLDER names one.", metavar="[MODEL]..."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; others than this machine's own need a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    slots: Annotated[int, typer.Option(help="Answers at a time.", min=1)] = 16,
    capacity: Annotated[
        int | None, typer.Option(help="Most tokens of a prompt and its answer; by default the model's context.", min=2)
    ] = None,
    memory: Annotated[float | None, typer.Option(help="GiB for states: running, kept and a draft's.", min=0)] = None,
    guess: Guess = False,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="A small model with the same vocabulary that guesses tokens; with several models MODEL=FOLDER.",
            metavar="FOLDER",
        ),
    ] = None,
    guesses: Guesses = None,
    kv: Kv = None,
    cache: Policy = None,
    watermark: KeyFile = None,
    watermark_kind: MarkKind = "gumbel",
    rpm: Annotated[float | None, typer.Option(help="Requests per minute of a key.", min=0)] = None,
    tpm: Annotated[float | None, typer.Option(help="Tokens per minute of a key.", min=0)] = None,
    drain: Annotated[
        float, typer.Option(help="Seconds that answers may go on after the first signal to end.", min=0)
    ] = 30.0,
    upstream: Annotated[
        str | None, typer.Option(help="Instead of models: the address of another server, with /v1, to stand before.")
    ] = None,
    upstream_key_env: Annotated[
        str | None, typer.Option(help="The environment variable that holds our key at that server.")
    ] = None,
    traces: Annotated[
        str | None,
        typer.Option(help="Send OpenTelemetry traces there, for example http://127.0.0.1:4318.", metavar="URL"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    weights: Weights = "auto",
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            help="LoRA as peft saves it, asked for as MODEL:NAME; with several models MODEL:NAME=FOLDER. Repeat it.",
            metavar="NAME=FOLDER",
        ),
    ] = None,
) -> None:
    """Serve models over HTTP.

    OpenAI clients find what they expect there. With --upstream another server answers, and ours keeps keys,
    rates, bounds and metrics before it. Keys come from the environment:
    ARMILLARY_API_KEYS="name:secret,other:secret". Without keys the server answers this machine only.

    Example: armillary serve runs/demo
    """
    from armillary.base.errors import InputError
    from armillary.base.memory import give_back, share

    share()
    try:
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError:
        raise InputError("serving needs an extra", hint="pip install 'armillary[server]'") from None
    import sys

    from armillary.cli.shared import open_model, refuse_unused, watermark_of
    from armillary.engine.core import Engine
    from armillary.server import Door, Hosted, Load, Server, check_address, leave, log_to, run

    keys = read_keys(os.environ.get(KEYS, ""))
    check_address(host, bool(keys))
    for option, number in (("--rpm", rpm), ("--tpm", tpm), ("--memory", memory)):
        if number is not None and number <= 0:
            raise InputError(f"{option} is {number:g}", hint="give more than 0, or leave it out for no bound")
    if bool(models) == (upstream is not None):
        raise InputError("give models, or --upstream, and not both", hint="armillary serve runs/demo")
    if upstream_key_env is not None and (upstream is None or not os.environ.get(upstream_key_env)):
        raise InputError(
            f"--upstream-key-env {upstream_key_env} names no variable that is set"
            if upstream is not None
            else "--upstream-key-env goes with --upstream"
        )
    behind = None
    if upstream is not None:
        ours = {"--watermark": watermark, "--kv": kv, "--guess": guess or None, "--memory": memory}
        ours |= {
            "--draft": bool(draft) or None,
            "--guesses": guesses,
            "--cache": cache,
            "--capacity": capacity,
            "--adapter": bool(adapter) or None,
        } | {
            option: value
            for option, value in (("--weights", weights), ("--device", device), ("--dtype", dtype))
            if value != "auto"
        }
        refuse_unused(ours, "the server behind --upstream holds the models")
        try:
            from armillary.server.upstream import Upstream
        except ImportError:
            raise InputError("a gateway needs an extra", hint="pip install 'armillary[server]'") from None
        behind = Upstream(upstream, os.environ[upstream_key_env] if upstream_key_env else None, most=4 * slots)
    kept = checked(kv, cache, guess, bool(draft), guesses)
    folders = named(models or ())
    drafts = check_folders(folders, draft or (), adapter or ())
    tracing = traced(traces)
    mark = None if watermark is None else watermark_of(watermark, watermark_kind)
    hosted: list[Hosted] = []
    for name, folder in folders.items():
        model = open_model(folder, device, dtype, mapped=True)
        engine = None
        if generates(name, model.settings):
            engine = Engine(
                model.network,
                model.tokenizer,
                slots=slots,
                capacity=capacity,
                memory=None if memory is None else int(memory * 2**30),
                drafter=drafter(model, guess, drafts.get(name), guesses, slots, device, dtype, weights),
                mark=mark,
                cache=kept,
                weights=weights,  # type: ignore[arg-type]
            ).start()
        hosted.append(Hosted(name, model.network, model.tokenizer, engine, Load(4 * slots)))
    hosted += [adapted(one, hosted) for one in adapter or ()]
    if len({one.name for one in hosted}) < len(hosted):
        raise InputError("two adapters, or a model and an adapter, have one name")
    warn_lossy(cache)
    log_to(sys.stderr)

    def started(port: int) -> None:
        shown = f"[{host}]" if ":" in host else host
        note(f"serving {upstream or ', '.join(one.name for one in hosted)} on http://{shown}:{port}/v1")

    door = Door(keys, requests_per_minute=rpm, tokens_per_minute=tpm)
    serving = Server(hosted, door, behind, tracing)
    give_back()
    run(serving, host, port, drain, started)
    leave()


def named(models: Sequence[str]) -> dict[str, str]:
    """FOLDER or NAME=FOLDER → folders by name; raises InputError for two of one name."""
    from armillary.base.errors import InputError

    found: dict[str, str] = {}
    for given in models:
        name, _, folder = given.rpartition("=")
        name = name or Path(folder).name or folder
        if name in found:
            raise InputError(f"two models are called '{name}'", hint=f"name one: other={folder}")
        found[name] = folder
    return found


def generates(name: str, settings: ModelSettings) -> bool:
    """Whether a model writes text; raises InputError for one that cannot be served."""
    from armillary.base.errors import InputError

    if settings.form == "encoder_decoder":
        raise InputError(f"'{name}' is an encoder–decoder, which cannot be served yet", hint="armillary generate")
    return settings.form != "encoder" and settings.head.kind == "language_model"


def check_folders(folders: Mapping[str, str], drafts: Sequence[str], adapters: Sequence[str]) -> dict[str, str]:
    """What the folders of several models, drafts and adapters say of themselves, before the weights of any are read:
    loading the first may take minutes. Returns the draft of each model that has one; raises ArmillaryError."""
    from armillary.base.errors import InputError
    from armillary.checkpoints import load
    from armillary.checkpoints.adapters import read_adapter
    from armillary.engine.drafts import check_draft

    if len(folders) + len(drafts) + len(adapters) < 2:
        return {}  # the only one says it itself
    models = {name: load(folder, device="cpu", empty=True) for name, folder in folders.items()}
    writing = [name for name, model in models.items() if generates(name, model.network.settings)]
    found: dict[str, str] = {}
    if drafts and not writing:
        raise InputError("no model here generates text, so there is nothing to guess", hint="leave out --draft")
    for given in drafts:
        name, _, folder = given.rpartition("=")
        name = which(name, writing, f"--draft {given}", f"--draft {writing[0]}={folder}")
        if name in found:
            raise InputError(f"'{name}' has two drafts: {found[name]} and {folder}")
        own, small = models[name].tokenizer, load(folder, device="cpu", empty=True)
        if own is not None:  # else the model says that it needs one
            check_draft(small.network.settings.form, own, small.tokenizer, f"--draft {folder}")
        found[name] = folder
    for given in adapters:
        name, _, folder = adapter_of(given, list(folders))
        if name in writing:
            read_adapter(folder, models[name].network)
    return found


def which(name: str, known: Sequence[str], option: str, better: str) -> str:
    """The model that an option speaks of: by its name, or the only one; raises InputError."""
    from armillary.base.errors import InputError, nearest

    if name and name not in known:
        raise InputError(f"there is no model '{name}' for {option}", hint=nearest(name, known))
    if not name and len(known) != 1:
        raise InputError(f"{option} does not say of which model", hint=better)
    return name or known[0]


def adapter_of(given: str, models: Sequence[str]) -> tuple[str, str, str]:
    """NAME=FOLDER or MODEL:NAME=FOLDER → model, name and folder of an adapter; raises InputError."""
    title, _, folder = given.rpartition("=")
    base, _, name = (title or Path(folder).name).rpartition(":")
    return which(base, models, f"--adapter {given}", f"--adapter {models[0]}:{given}"), name, folder


def adapted(given: str, hosted: Sequence[Hosted]) -> Hosted:
    """NAME=FOLDER or MODEL:NAME=FOLDER → that model with the adapter; raises ArmillaryError."""
    from armillary.base.errors import InputError
    from armillary.checkpoints.adapters import read_adapter

    bases = {one.name: one for one in hosted if one.parent is None}
    base, name, folder = adapter_of(given, list(bases))
    model = bases[base]
    if not model.generates:
        raise InputError(f"'{model.name}' does not generate text, so it takes no --adapter {given}")
    return model.adapted(name, read_adapter(folder, model.network))


def traced(given: str | None) -> Tracing | None:
    """Traces where `given` or the environment asks for them; raises InputError."""
    from armillary.base.errors import InputError
    from armillary.server.run import Lines
    from armillary.server.tracing import configured, connect

    if given is None and not configured():
        return None
    try:
        return connect(given, Lines())
    except InputError as error:
        if given is not None:
            raise
        note(f"OTEL_EXPORTER_OTLP_ENDPOINT is set, but no traces are sent: {error}")  # set for others, it may be
        return None


def read_keys(text: str) -> dict[str, str]:
    """`name:secret,name:secret` → {secret: name}; raises InputError."""
    from armillary.base.errors import InputError

    found: dict[str, str] = {}
    for place, part in enumerate(filter(None, (part.strip() for part in text.split(",")))):
        name, colon, secret = part.partition(":")
        if not colon or not name or len(secret) < 8:
            raise InputError(
                f"entry {place + 1} of {KEYS} is no name with a secret of 8 characters or more",
                hint="write name:secret, several with commas between",
            )
        if secret in found:
            raise InputError(f"two names of {KEYS} have one secret: '{found[secret]}' and '{name}'")
        found[secret] = name
    return found


COMMANDS = {"serve": serve}
