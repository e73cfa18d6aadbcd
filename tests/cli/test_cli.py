"""The command line as a user sees it: help, the way from a recipe to an exported model, and mistakes.

Commands run in this process through `main`, the installed entry point, so that error handling is
tried too and PyTorch is loaded once. Where a figure is checked, it is against the Python face.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
import pytest
import typer

from armillary.cli.main import app, main
from armillary.nn.ops import computes_bf16

COMMANDS = sorted(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
TINY = (
    "tokenizer.kind=byte",
    "model.width=16",
    "model.depth=1",
    "model.context=32",
    "training.context=32",
    "training.batch=2",
    "training.steps=4",
    "training.sample_prompts=[]",
    "training.compile=no",
    "data.workers=1",
    "data.heldout=0.3",
)


@dataclass
class Shown:
    """What a command printed and how it ended."""

    out: str
    err: str
    status: int


Armillary = Callable[..., Shown]


@pytest.fixture
def armillary(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Armillary:
    def run(*words: str) -> Shown:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["armillary", *words])
        try:
            main()
            status = 0
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        shown = capsys.readouterr()
        assert "Traceback" not in shown.err
        return Shown(shown.out, shown.err, status)

    return run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few KB of real text: small modules of the Python standard library."""
    folder = tmp_path_factory.mktemp("cli") / "corpus"
    folder.mkdir()
    library = Path(os.__file__).parent
    for name in ("this.py", "bisect.py", "keyword.py", "stat.py", "colorsys.py", "sched.py", "linecache.py"):
        shutil.copy(library / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def trained(corpus: Path) -> Path:
    """A run of four steps, made by the command itself."""
    folder = corpus.parent / "runs" / "one"
    done = _train(corpus, "--run", str(folder))
    assert done == 0
    return folder


def _train(corpus: Path, *words: str) -> int:
    before = sys.argv
    sys.argv = ["armillary", "train", "quick", *words, f"data.sources=[{{path: {corpus}}}]", *TINY]
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


# -- help


@pytest.mark.parametrize("command", COMMANDS)
def test_help_explains_itself(armillary: Armillary, command: str) -> None:
    shown = armillary(command, "--help")
    assert shown.status == 0
    # one real example that can be copied: a single line that names the command, whose words it would take
    example = shown.out.split("Example:\n")[1].splitlines()[0].strip()
    assert example.startswith(f"armillary {command} ")
    assert "\\[" not in shown.out
    parts = shown.out.split("Arguments:\n")
    if len(parts) > 1:  # each is explained beside its name
        rows = [row for row in parts[1].split("\n\n")[0].splitlines() if not row.startswith("   ")]
        assert rows and all(len(row.split(maxsplit=1)) == 2 for row in rows), rows


@pytest.mark.parametrize("command", COMMANDS)
def test_the_example_is_one_that_the_command_takes(
    armillary: Armillary, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its words parse: every option exists and every argument is there."""
    import shlex

    example = armillary(command, "--help").out.split("Example:\n")[1].splitlines()[0]
    words = shlex.split(example)[2:]
    made = typer.main.get_command(app).commands[command]  # type: ignore[attr-defined]
    with made.make_context(command, words) as context:
        required = [p.name for p in made.params if isinstance(p, click.Argument) and p.required]
        assert all(context.params[name or ""] is not None for name in required)


def test_only_a_server_begins_anew(armillary: Armillary, monkeypatch: pytest.MonkeyPatch) -> None:
    begun = list[bool]()
    monkeypatch.setattr("armillary.base.memory.begin_whole", lambda: begun.append(True))
    assert armillary("--help").status == armillary("show", "--help").status == 0
    assert not begun
    assert armillary("serve", "--help").status == 0
    assert begun == [True]


def test_the_list_of_commands_is_whole(armillary: Armillary) -> None:
    shown = armillary("--help")
    lines = shown.out.split("Commands:\n")[1].splitlines()
    assert sorted(line.split()[0] for line in lines) == COMMANDS
    assert all(line.endswith(".") and not line.endswith("...") for line in lines)


def test_version(armillary: Armillary) -> None:
    from armillary import __version__

    assert armillary("--version").out == f"{__version__}\n"


def test_shell_completion(tmp_path: Path) -> None:
    """The script that a shell sources asks the command itself, which answers with its sub-commands."""
    program = "import sys; sys.argv[0] = 'armillary'; from armillary.cli.main import main; main()"

    def run(*words: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program, *words],
            env={**os.environ, "HOME": str(tmp_path), **environment},
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        assert not done.stderr, done.stderr
        return done.stdout

    detected = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # the tests' own parent is no shell
    assert "bash completion installed" in run("--install-completion", "bash", **detected)
    script = (tmp_path / ".bash_completions" / "armillary.sh").read_text()
    assert "_ARMILLARY_COMPLETE=complete_bash" in script
    assert ".bash_completions/armillary.sh" in (tmp_path / ".bashrc").read_text()
    answer = run(_ARMILLARY_COMPLETE="complete_bash", COMP_WORDS="armillary e", COMP_CWORD="1")
    assert answer.split() == ["evaluate", "embed", "export"]


# -- the whole way


def test_a_new_recipe_is_explained_and_shown(
    armillary: Armillary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert armillary("new", "mine.yaml", "model.width=48").status == 0
    text = Path("mine.yaml").read_text()
    assert "width: 48" in text and "name: mine" in text and text.count("#") > 40
    shown = armillary("show", "mine.yaml", "--length", "64", "--json", "model.depth=2")
    facts = json.loads(shown.out)
    assert (facts["name"], len(facts["blocks"]), facts["length"]) == ("mine", 2, 64)
    # keys and values of two blocks in two bytes: [2 × 2, 64, 48]
    assert facts["state_bytes"] == 2 * 2 * 64 * 48 * (2 if computes_bf16() else 4)  # precision: auto
    text = armillary("show", "mine.yaml").out
    assert "training memory" in text and "native steps" in text
    text = armillary("show", "mine.yaml", "model.block={mixer: additive, channel: gated}").out
    assert "blocks.0.mixer and" in text and "Additive has no native step" in text
    again = armillary("new", "mine.yaml")
    assert again.status == 2 and "already there" in again.err and "--force" in again.err
    assert armillary("new", "recipe.schema.json", "--schema").status == 0
    assert json.loads(Path("recipe.schema.json").read_text())["title"] == "Armillary recipe"


def test_data_alone(armillary: Armillary, corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    shutil.copy(corpus / "bisect.py", tmp_path / "in" / "bisect.py")
    shutil.copy(corpus / "stat.py", tmp_path / "in" / "stat.py")
    (tmp_path / "in" / "noise.py").write_bytes(bytes(range(256)) * 4)
    words = ("quick", f"data.sources=[{{path: {tmp_path / 'in'}}}]", *TINY, "--folder", str(tmp_path / "prepared"))
    facts = json.loads(armillary("data", *words, "--json").out)
    sizes = [len((corpus / name).read_bytes()) for name in ("bisect.py", "stat.py")]
    (source,) = facts["sources"]
    assert (source["bytes"], source["skipped"]) == (sum(sizes), 1)
    # bytes are tokens, and every document (a small source is cut, to have some to hold out) begins with one more
    assert facts["train"]["tokens"] + facts["heldout"]["tokens"] == sum(sizes) + source["documents"]
    shown = armillary("data", *words)
    assert "noise.py" in shown.out and "1 skipped" in shown.out


def test_training_leaves_a_whole_run_folder(trained: Path) -> None:
    held = {path.name for path in trained.iterdir()}
    assert {"recipe.yaml", "evaluation.json", "report.html", "card.md", "metrics.jsonl", "checkpoints"} <= held


def test_a_run_is_not_replaced_by_accident(armillary: Armillary, trained: Path) -> None:
    shown = armillary("train", "quick", *TINY, "--run", str(trained))
    assert shown.status == 2 and "armillary resume" in shown.err


def test_resume_goes_on(armillary: Armillary, corpus: Path, tmp_path: Path) -> None:
    """A run that was stopped after two steps is finished by `resume`, as one that never was."""
    import armillary as arm

    recipe = arm.Recipe.load("quick", f"data.sources=[{{path: {corpus}}}]", *TINY)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arm.train(recipe, whole)
    assert arm.train(recipe, parts, stop_after=2).stopped
    shown = armillary("resume", str(parts), "--json")
    assert shown.status == 0
    assert json.loads(shown.out)["run"] == str(parts)
    weights = ["checkpoints/step-4/model.safetensors", "checkpoints/step-00000004/model.safetensors"]
    found = [path for name in weights for path in (whole / name, parts / name) if path.is_file()]
    if not found:
        found = [next(run.glob("checkpoints/*4/model.safetensors")) for run in (whole, parts)]
    assert found[0].read_bytes() == found[1].read_bytes()
    more = armillary("resume", str(parts), "model.width=32")
    assert more.status == 2 and "training only" in more.err


def test_evaluate_says_what_the_python_face_says(armillary: Armillary, trained: Path, corpus: Path) -> None:
    import armillary as arm
    from armillary.evaluate import evaluate

    facts = json.loads(armillary("evaluate", str(trained), "--json").out)
    again = evaluate(arm.load(trained), trained)
    assert facts["bits_per_byte"]["value"] == pytest.approx(again.bits_per_byte.value, rel=1e-6)
    shown = armillary("evaluate", str(trained), "--data", str(corpus / "this.py"))
    assert shown.status == 0 and "bits per byte" in shown.out and "1 documents" in shown.out


def test_generate_holds_weights_as_asked(armillary: Armillary, trained: Path) -> None:
    words = ("generate", str(trained), "import", "--tokens", "6", "--temperature", "0", "--json", "--weights")
    found = {kind: json.loads(armillary(*words, kind).out) for kind in ("plain", "float32", "int8")}
    assert found["plain"]["ids"] == found["float32"]["ids"]
    assert found["int8"]["logprobs"] != found["float32"]["logprobs"]
    wrong = armillary(*words, "int3")
    assert wrong.status == 2 and "int8" in wrong.err


def test_generate_repeats_itself_for_a_seed(armillary: Armillary, trained: Path) -> None:
    import armillary as arm

    words = ("generate", str(trained), "import", "--tokens", "6", "--seed", "3", "--temperature", "0.9")
    facts = json.loads(armillary(*words, "--json").out)
    done = arm.load(trained).generate("import", max_new_tokens=6, seed=3, temperature=0.9)
    assert (facts["ids"], facts["text"], facts["prompt"]) == (list(done.ids), done.text, "import")
    assert armillary(*words).out == f"import{done.text}\n"
    searched = json.loads(armillary("generate", str(trained), "import", "-n", "4", "--beams", "3", "--json").out)
    assert searched["ids"] == arm.load(trained).generate("import", max_new_tokens=4, beams=3).ids
    refused = armillary(*words, "--beams", "3")
    assert refused.status == 2 and "no argument 'temperature'" in refused.err


def test_generate_guesses_and_keeps_as_asked(
    armillary: Armillary, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Guesses change nothing; caches say what the Python face says."""
    import armillary as arm
    from armillary.engine.drafts import DraftModel, PromptLookup
    from armillary.nn.cache import Int8, Salient

    words = ("generate", str(trained), "import", "--tokens", "20", "--temperature", "0", "--json")
    plain = json.loads(armillary(*words).out)["ids"]
    most = list[int]()
    for kind in (DraftModel, PromptLookup):
        name = "write" if kind is DraftModel else "propose"  # what an engine asks by
        method = getattr(kind, name)

        def watched(self, *given, asked=method):
            most.append(self.count)
            return asked(self, *given)

        monkeypatch.setattr(kind, name, watched)
    for more, count in (
        (("--draft", str(trained)), 6),
        (("--draft", str(trained), "--guesses", "3"), 3),
        (("--guess",), 6),
        (("--guess", "--guesses", "2"), 2),
        (("--guess", "--kv", "int8"), 6),
    ):
        most.clear()
        found = json.loads(armillary(*words, *more).out)["ids"]
        assert set(most) == {count}, more
        assert found == plain or "--kv" in more
    model = arm.load(trained)
    kept = armillary(*words, "--cache", "salient:8,window=4")
    assert (
        json.loads(kept.out)["ids"]
        == model.generate("import", max_new_tokens=20, temperature=0, cache=Salient(8, window=4)).ids
    )
    assert "salient:8,window=4 is lossy" in kept.err
    eight = json.loads(armillary(*words, "--kv", "int8").out)
    expected = model.generate("import", max_new_tokens=20, temperature=0, cache=Int8())
    assert (eight["ids"], eight["logprobs"]) == (expected.ids, expected.logprobs)
    assert eight["logprobs"] != json.loads(armillary(*words).out)["logprobs"]


def test_a_draft_with_another_vocabulary_is_refused(armillary: Armillary, trained: Path, tmp_path: Path) -> None:
    import armillary as arm
    from armillary.model import Model
    from armillary.text import TokenizerSettings, train_tokenizer

    own = arm.load(trained)
    longer = train_tokenizer(TokenizerSettings(kind="bpe", size=270), ["import this and that"] * 9)
    other = arm.build(own.settings.derive(vocabulary=longer.size), seed=1).network
    arm.save(Model(other, longer), tmp_path / "longer")
    shown = armillary("generate", str(trained), "import", "--draft", str(tmp_path / "longer"))
    assert shown.status == 2 and f"vocabulary of {longer.size} tokens" in shown.err and "--draft" in shown.err
    # as many tokens, one of which is another
    inner = json.loads((tmp_path / "longer" / "tokenizer.json").read_text())
    a, b = inner["model"]["vocab"]["a"], inner["model"]["vocab"]["b"]
    inner["model"]["vocab"] |= {"a": b, "b": a}
    (tmp_path / "swapped.json").write_text(json.dumps(inner))
    from armillary.engine.drafts import check_draft
    from armillary.text import Tokenizer

    with pytest.raises(
        arm.base.errors.InputError, match=r"token \d+ is b'[ab]' in this draft and b'[ab]' in the model"
    ):
        check_draft("decoder", longer, Tokenizer.from_file(tmp_path / "swapped.json"))


def test_generate_ends_with_the_context_and_says_so(
    armillary: Armillary, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context is 32, and `import` has 6 bytes after one token that begins texts."""
    import io

    words = ("generate", str(trained), "import", "--temperature", "0", "--json")
    shown = armillary(*words, "--tokens", "60")
    found = json.loads(shown.out)
    begun = 32 - len(found["ids"])
    assert begun in (6, 7) and found["finish"] == "length"
    assert f"ended after {32 - begun} tokens: with the prompt they fill the context of 32" in shown.err
    assert "fill the context" not in armillary(*words, "--tokens", str(32 - begun)).err
    short = armillary("generate", str(trained), "import", "--temperature", "0", "--tokens", "60")
    assert short.out == f"import{found['text']}\n" and "fill the context of 32" in short.err
    searched = armillary(*words[:3], "--json", "--tokens", "60", "--beams", "2")
    assert len(json.loads(searched.out)["ids"]) == 32 - begun
    longer = armillary(*words, "--tokens", "60", "--capacity", "100")
    assert len(json.loads(longer.out)["ids"]) == 60 and "fill the context" not in longer.err
    full = armillary("generate", str(trained), "x" * 40)
    assert full.status == 2 and "32 is the most, answer included" in full.err
    monkeypatch.setattr(sys, "stdin", io.StringIO("x" * 40 + "\n\n"))
    talk = armillary("chat", str(trained))
    assert talk.status == 2 and "32 is the most" in talk.err


@pytest.mark.parametrize(
    "words, named",
    [
        (("--guess", "--draft", "x"), "--guess and --draft"),
        (("--guesses", "3"), "--guesses would do nothing"),
        (("--cache", "salient:8", "--kv", "int8", "--guess"), "--cache salient:8 does not go with --kv, --guess"),
        (("--cache", "salient:8", "--draft", "x"), "does not go with --draft"),
        (("--cache", "slient:8"), "did you mean 'salient'"),
        (("--kv", "int4"), "--kv is 'int4'"),
        (("--beams", "2", "--guess", "--cache", "sinks:8"), "--guess, --cache would do nothing"),
        (("--url", "http://x/v1", "--draft", "x", "--capacity", "9"), "--capacity, --draft would do nothing"),
        (("--draft", "no/such/draft"), "there is no such folder"),
    ],
)
def test_options_that_do_not_go_together(armillary: Armillary, trained: Path, words: tuple, named: str) -> None:
    shown = armillary("generate", str(trained), "import", *words)
    assert shown.status == 2 and named in shown.err


def test_export_and_import(armillary: Armillary, trained: Path, tmp_path: Path) -> None:
    """The open folder and its way back write the same text as the run."""
    opened, native = str(tmp_path / "open"), str(tmp_path / "native")
    assert armillary("export", str(trained), opened).status == 0
    assert (Path(opened) / "config.json").is_file()
    assert armillary("import", opened, native).status == 0
    assert (Path(native) / "armillary.json").is_file()
    words = ("def ", "-n", "5", "--temperature", "0", "--json")
    texts = [json.loads(armillary("generate", place, *words).out)["ids"] for place in (str(trained), opened, native)]
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 5
    numbers = [json.loads(armillary("show", place, "--json").out)["parameters"] for place in (str(trained), opened)]
    assert numbers[0] == numbers[1]
    again = armillary("export", str(trained), opened)
    assert again.status == 2 and "--force" in again.err
    assert armillary("export", str(trained), opened, "--force").status == 0


def test_embed_classify_and_chat(armillary: Armillary, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    lines = armillary("embed", str(trained), "one", "two").out.splitlines()
    assert [json.loads(line)["text"] for line in lines] == ["one", "two"]
    assert all(len(json.loads(line)["embedding"]) == 16 for line in lines)
    shares = json.loads(armillary("classify", str(trained), "import", "--label", "a", "--label", "b", "--json").out)
    assert sum(shares.values()) == pytest.approx(1)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n\n"))
    shown = armillary("chat", str(trained), "--tokens", "3")
    assert shown.status == 0 and shown.out.count("\n") >= 1


def test_text_comes_through_a_pipe(armillary: Armillary, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("class "))
    assert json.loads(armillary("generate", str(trained), "-n", "1", "--json").out)["prompt"] == "class "


def test_demo(armillary: Armillary, corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "demo"
    shown = armillary("demo", str(corpus), "--run", str(run), *(word for key in TINY for word in ("--set", key)))
    assert shown.status == 0, shown.err
    for wanted in ("uniform", "5-gram", "lzma", "it writes:", "--- 3", str(run / "report.html"), "next:"):
        assert wanted in shown.out, wanted
    assert shown.out.count("  armillary ") == 3
    assert (run / "report.html").is_file()


# -- mechanisms


def test_mechanisms_and_check(armillary: Armillary, tmp_path: Path) -> None:
    shown = armillary("mechanisms", "norm")
    assert "rmsnorm" in shown.out and "Zhang & Sennrich 2019" in shown.out
    assert set(json.loads(armillary("mechanisms", "mixer", "--json").out)) >= {"attention", "retention"}
    results = json.loads(armillary("check", "position", "none", "--json").out)
    assert results and all(one["passed"] for one in results)


def test_check_finds_what_is_broken(armillary: Armillary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A norm in the user's own file that looks at later tokens."""
    from armillary.nn.mechanism import norms

    norms.names()
    monkeypatch.setattr(norms, "_entries", dict(norms._entries))  # what is registered here is gone afterwards
    file = tmp_path / "wrong.py"
    file.write_text(
        "from typing import ClassVar\n"
        "from armillary.nn.mechanism import norms\n"
        "from armillary.nn.norms.rmsnorm import RMSNorm, RMSNormSettings\n\n\n"
        "@norms.register\n"
        "class WrongSettings(RMSNormSettings):\n"
        '    """Less the mean over all tokens."""\n\n'
        '    kind: ClassVar[str] = "wrong_norm"\n\n'
        "    def build(self, *arguments):\n"
        "        return Wrong(*arguments, 1e-6)\n\n\n"
        "class Wrong(RMSNorm):\n"
        "    def forward(self, x):\n"
        "        return super().forward(x - x.mean(-2, keepdim=True))\n"
    )
    shown = armillary("check", "norm", "wrong_norm", "--file", str(file))
    assert shown.status == 1
    assert [line for line in shown.out.splitlines() if "FAILED" in line and "causality" in line]


# -- compare


@pytest.mark.timeout(240)
def test_compare_prints_figures_and_words(
    armillary: Armillary, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain lines where there is no terminal; called again, it only says what it found."""
    from armillary.compare import measure

    for name, value in {"SHORTEST": 64, "LONGEST": 64, "HALVINGS": 2, "REPEATS": 1}.items():
        monkeypatch.setattr(measure, name, value)
    words = ("compare", "quick", f"data.sources=[{{path: {corpus}}}]", *TINY, "training.precision=float32")
    words += ("--vary", "model.block.mixer=one head:{kind: attention, heads: 1}", "--budget", "2steps", "--seeds", "2")
    words += ("--probes", "none", "--limit", "6", "--run", str(tmp_path / "c"))
    shown = armillary(*words)
    assert shown.status == 0, shown.err
    assert "2 variants × 2 seeds: 4 runs" in shown.err and "one head, seed 1: " in shown.err and "\x1b" not in shown.err
    assert "one head" in shown.out and str(tmp_path / "c" / "report.html") in shown.out
    again = armillary(*words, "--json")
    assert "4 of them done" in again.err
    facts = json.loads(again.out)
    for sentence in facts["conclusion"]:
        assert sentence in shown.out
    assert [row["name"] for row in facts["variants"]] == ["base", "one head"] and facts["finished"]
    other = armillary(*words, "--seeds", "3")
    assert other.status == 2 and "seeds: [0, 1] → [0, 1, 2]" in other.err


def test_an_interrupted_compare_says_how_to_go_on(
    armillary: Armillary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import armillary.compare as room

    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(room, "compare", interrupted)
    words = ("compare", "quick", "--vary", "model.width=32", "--budget", "2steps", "--run", str(tmp_path / "c"))
    shown = armillary(*words)
    assert shown.status == 130 and "same command" in shown.err and str(tmp_path / "c") in shown.err


def test_how_many_tokens_languages_take(armillary: Armillary, tmp_path: Path) -> None:
    import armillary as arm
    from armillary.checkpoints import save
    from armillary.text import TokenizerSettings, train_tokenizer

    tokenizer = train_tokenizer(TokenizerSettings(kind="byte"), [])
    settings = {"width": 8, "depth": 1, "vocabulary": tokenizer.size, "block": {"channel": {"kind": "ffn"}}}
    save(tmp_path / "model", arm.build(settings).network, tokenizer)
    (tmp_path / "words.txt").write_text("ab cd\nef\n", encoding="utf-8")
    (tmp_path / "german.txt").write_text("Größe", encoding="utf-8")
    files = [f"--text={tmp_path / 'words.txt'}", f"--text=de={tmp_path / 'german.txt'}"]
    shown = armillary("show", str(tmp_path / "model"), *files, "--json")
    assert json.loads(shown.out)["fertility"] == {
        "words": {"tokens_per_word": 7 / 3, "tokens_per_byte": 1.0},
        "de": {"tokens_per_word": 7.0, "tokens_per_byte": 1.0},
    }
    assert "7.00 per word" in armillary("show", str(tmp_path / "model"), *files).out
    missing = armillary("show", str(tmp_path / "model"), "--text", str(tmp_path / "none.txt"))
    assert missing.status == 2 and "none.txt" in missing.err
    assert "folder of a model" in armillary("show", "quick", *files).err


def test_the_live_table_shows_every_run() -> None:
    import io

    from armillary.cli.comparing import Board
    from armillary.compare import Failed, Measured, Planned, Probed, Working
    from armillary.train import Stepped

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Board(stream) as board:
        board(Planned(("base", "[red]new"), (0, 1), "runs/c", {("base", 0): 2.0}))
        board(Measured("[red]new", 0, 1.9))
        inner = Stepped(3, 10, 1.5, 2.25, 1234.0, 61.0)
        board(Working("training", "base", 1, 0.3, 125.0, inner))
        board(Failed("[red]new", 1, "the loss is not finite"))
        board(Probed(("base",), "recall", "causal-self", None, 0.1, "cannot"))
        board._live.refresh()
    shown = stream.getvalue()
    for part in (
        "2.0000",
        "1.9000",
        "-0.1000",
        "30 %",
        "step 3/10",
        "1,234 tokens/s",
        "2:05 left",
        "failed",
        "[red]new",
    ):
        assert part in shown, part


# -- mistakes: one message, status 2, no traceback (the fixture sees to that)


@pytest.mark.parametrize(
    "words, message, hint",
    [
        (("show", "quick", "model.widht=3"), "unknown key 'widht'", "did you mean 'width'?"),
        (("show", "quick", "model.width=much"), "model.width", "found 'much'"),
        (("show", "quick", "training.context=99999"), "model.context", "set model.context=99999"),
        (("train", "nowhere.yaml"), "there is no recipe at nowhere.yaml", "quick"),
        (("train", "quikc"), "there is no recipe called 'quikc'", "did you mean 'quick'?"),
        (("train", "quick", "data.sources=[{path: nowhere}]"), "nowhere", ""),
        (("resume", "nowhere"), "not a run", ""),
        (("generate", "nowhere/at/all", "x"), "there is no such folder", ""),
        (("evaluate", "nowhere/at/all"), "there is no such folder", ""),
        (("mechanisms", "mixers"), "there is no role 'mixers'", "did you mean 'mixer'?"),
        (("check", "mixer", "atention"), "unknown mixer 'atention'", "did you mean 'attention'?"),
        (("check", "mixer", "x", "--file", "nowhere.py"), "no such file", ""),
        (("export", "nowhere/at/all", "there"), "there is no such folder", ""),
        (("compare", "quick", "--budget", "2steps"), "nothing is varied", "--vary"),
        (("compare", "quick", "--vary", "model.width=64"), "no budget", "--budget"),
        (("compare", "quick", "--vary", "model.width=64", "--budget", "200"), "has no unit", "500steps"),
        (("compare", "quick", "--vary", "model.widht=64", "--budget", "2steps"), "unknown key 'widht'", "'width'"),
        (
            ("compare", "quick", "--vary", "model.width=64", "--budget", "2steps", "--seeds", "0"),
            "0 seeds",
            "at least 1",
        ),
        (
            ("compare", "quick", "--vary", "model.block.mixer.heads=3", "--budget", "2steps"),
            "the variant 'heads=3' cannot be built",
            "change width or heads",
        ),
        (
            ("compare", "quick", "--vary", "model.width=64", "--budget", "2steps", "--equal-loss", "--seeds", "3"),
            "equal loss cannot be shown with 3 seeds",
            "--seeds 5",
        ),
    ],
)
def test_a_mistake_has_one_message(
    armillary: Armillary,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    message: str,
    hint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = armillary(*words)
    assert shown.status == 2
    assert shown.err.count("error:") == 1 and message in shown.err and hint in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("words", [("generate",), ("trian", "quick"), ("train", "quick", "--nothing")])
def test_wrong_usage_has_one_message(armillary: Armillary, words: tuple[str, ...]) -> None:
    shown = armillary(*words)
    assert shown.status == 2 and "--help" in shown.err


def test_a_mistake_in_a_file_names_its_line(armillary: Armillary, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("model:\n  width: 32\n  deth: 2\n")
    shown = armillary("show", str(file))
    assert shown.status == 2 and f"{file}:3" in shown.err and "did you mean 'depth'?" in shown.err


def test_a_run_without_held_out_text(armillary: Armillary, trained: Path, tmp_path: Path) -> None:
    armillary("export", str(trained), str(tmp_path / "open"))
    shown = armillary("evaluate", str(tmp_path / "open"))
    assert shown.status == 2 and "--data" in shown.err


def test_watermarks_are_written_and_found(armillary: Armillary, trained: Path, tmp_path: Path) -> None:
    import armillary as arm

    place = tmp_path / "key.txt"
    place.write_text("a long enough secret\n")
    words = ("--watermark", str(place))
    model, mark = arm.load(trained), arm.Watermark(b"a long enough secret")
    found = json.loads(armillary("generate", str(trained), "import", "--tokens", "6", *words, "--json").out)
    assert found["ids"] == model.generate("import", max_new_tokens=6, watermark=mark).ids
    letters = {model.tokenizer.encode(letter)[0]: 100.0 for letter in "abcdefghij"}  # a text that is read as written
    text = model.generate("import", max_new_tokens=60, watermark=mark, logit_bias=letters).text
    facts = json.loads(armillary("detect", str(trained), text, *words, "--json").out)
    other = json.loads(armillary("detect", str(trained), text, *words, "--watermark-kind", "kgw", "--json").out)
    assert facts["p"] < 1e-5 < other["p"]
    assert facts["z"] == arm.detect(text, mark, model.tokenizer).z
    shown = armillary("detect", str(trained), "text", "--watermark", str(tmp_path / "none"))
    assert shown.status == 2 and "cannot be read" in shown.err


def test_more_memory_than_there_is(monkeypatch: pytest.MonkeyPatch, armillary: Armillary) -> None:
    """What is asked for is too much: one error, no traceback."""

    def state(*_: object, **__: object) -> None:
        raise MemoryError("unable to allocate 381 GiB")

    monkeypatch.setattr("armillary.cli.models.open_model", state)
    shown = armillary("generate", "runs/none", "a")
    assert shown.status == 2
    assert "not enough memory: unable to allocate 381 GiB" in shown.err
