"""The house rules that no linter knows, and the promise that every shown command works.

Rules are functions from source text to findings, so that each is tried on a text that breaks it
before it is applied to the package.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "armillary"
SOURCES = sorted(PACKAGE.rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

WINGS = ("train", "adapt", "compress", "evaluate", "explain", "guard")
LONGEST = 600  # lines of one file


def _named(node: ast.expr, known: dict[str, str]) -> str:
    """The dotted name that an expression stands for once imports are followed, "" when it has none."""
    if isinstance(node, ast.Name):
        return known.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        before = _named(node.value, known)
        return f"{before}.{node.attr}" if before else ""
    return ""


def _imports(tree: ast.AST) -> Iterator[tuple[int, str, str]]:
    """(line, name bound here, dotted name that it stands for) of every import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                full = item.name if item.asname else item.name.partition(".")[0]
                yield node.lineno, item.asname or full, full
        elif isinstance(node, ast.ImportFrom) and node.module:
            for item in node.names:
                yield node.lineno, item.asname or item.name, f"{node.module}.{item.name}"


def _known(tree: ast.AST) -> dict[str, str]:
    return {bound: full for _, bound, full in _imports(tree)}


PRODUCTS = {f"torch.nn.{name}" for name in ("Linear", "Embedding", "Bilinear", "LazyLinear", "EmbeddingBag")}
CODE_IN_DATA = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
REFUSED = {
    "eval": "runs text",
    "exec": "runs text",
    "torch.load": "reads pickles",
    "torch.save": "writes pickles",
    "os.system": "runs a shell",
    "os.popen": "runs a shell",
    "yaml.load": "may build any object: yaml.safe_load or yaml.compose",
    "yaml.full_load": "may build any object: yaml.safe_load",
    "yaml.unsafe_load": "may build any object: yaml.safe_load",
    "jinja2.Environment": "runs templates unconfined: jinja2.sandbox",
    "jinja2.Template": "runs templates unconfined: jinja2.sandbox",
}
REFUSED_FLAGS = {"shell", "allow_pickle", "trust_remote_code"}


def bare_products(text: str) -> list[str]:
    """Trainable products that went past the seam."""
    tree = ast.parse(text)
    known = _known(tree)
    used = [
        (node.lineno, _named(node, known)) for node in ast.walk(tree) if isinstance(node, (ast.Attribute, ast.Name))
    ]
    found = used + [(line, full) for line, _, full in _imports(tree)]
    return sorted({f"line {line}: {name}" for line, name in found if name in PRODUCTS})


def unsafe_calls(text: str) -> list[str]:
    """Ways to have code executed by data."""
    tree = ast.parse(text)
    known = _known(tree)
    found = [f"line {line}: imports {full}" for line, _, full in _imports(tree) if full.split(".")[0] in CODE_IN_DATA]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = _named(node.func, known)
        if name in REFUSED:
            found.append(f"line {node.lineno}: {name} {REFUSED[name]}")
        found += [
            f"line {node.lineno}: {word.arg}"
            for word in node.keywords
            if word.arg in REFUSED_FLAGS and not (isinstance(word.value, ast.Constant) and not word.value.value)
        ]
    return found


def without_docstring(text: str) -> list[str]:
    return [] if ast.get_docstring(ast.parse(text)) else ["no docstring at the top"]


def too_long(text: str) -> list[str]:
    lines = text.count("\n")
    return [f"{lines} lines, at most {LONGEST}"] if lines > LONGEST else []


def other_wings_insides(text: str, wing: str, is_module: Callable[[str], bool]) -> list[str]:
    """Imports of a module inside another wing; its package face is what others may use."""
    found = []
    for line, _, full in _imports(ast.parse(text)):
        parts = full.split(".")
        if parts[0] == "armillary" and len(parts) > 2 and parts[1] in WINGS and parts[1] != wing:
            inside = len(parts) > 3 or is_module(full)
            found += [f"line {line}: {full}"] if inside else []
    return found


def _is_module(name: str) -> bool:
    path = PACKAGE.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _findings(rule: Callable[[str], list[str]], files: list[Path]) -> list[str]:
    assert files
    return [
        f"{path.relative_to(ROOT)}: {finding}" for path in files for finding in rule(path.read_text(encoding="utf-8"))
    ]


@pytest.mark.parametrize(
    "rule, text",
    [
        (bare_products, "from torch import nn\nlayer = nn.Linear(2, 2)\n"),
        (bare_products, "import torch\ntable = torch.nn.Embedding(2, 2)\n"),
        (bare_products, "import torch.nn as layers\nclass Mine(layers.Linear): ...\n"),
        (bare_products, "from torch.nn import Linear as L\n"),
        (unsafe_calls, "import pickle\n"),
        (unsafe_calls, "from joblib import load\n"),
        (unsafe_calls, "import torch\ntorch.load('x')\n"),
        (unsafe_calls, "from torch import load as read\nread('x')\n"),
        (unsafe_calls, "eval('1')\n"),
        (unsafe_calls, "exec('1')\n"),
        (unsafe_calls, "import yaml\nyaml.load('x', Loader=yaml.SafeLoader)\n"),
        (unsafe_calls, "import subprocess\nsubprocess.run('ls', shell=True)\n"),
        (unsafe_calls, "import subprocess\nsubprocess.run('ls', shell=risk)\n"),
        (unsafe_calls, "import numpy\nnumpy.load('x', allow_pickle=True)\n"),
        (unsafe_calls, "from jinja2 import Environment\nEnvironment()\n"),
        (without_docstring, "import os\n"),
        (too_long, "\n" * (LONGEST + 1)),
    ],
)
def test_each_rule_finds_what_breaks_it(rule: Callable[[str], list[str]], text: str) -> None:
    assert rule(text)


@pytest.mark.parametrize(
    "rule, text",
    [
        (
            bare_products,
            "from torch import nn\nfrom armillary.nn.linear import Linear\nclass A(nn.Module):\n    x = Linear\n",
        ),
        (unsafe_calls, "model.eval()\nspec.loader.exec_module(module)\nimport yaml\nyaml.safe_load('x')\n"),
        (unsafe_calls, "import subprocess\nsubprocess.run(['ls'], shell=False)\n"),
        (unsafe_calls, "from jinja2.sandbox import ImmutableSandboxedEnvironment as E\nE()\n"),
    ],
)
def test_rules_leave_good_code_alone(rule: Callable[[str], list[str]], text: str) -> None:
    assert rule(text) == []


def test_wing_rule_tells_faces_from_insides() -> None:
    modules = {"armillary.evaluate.report"}.__contains__
    assert other_wings_insides("from armillary.evaluate import report\n", "train", modules)
    assert other_wings_insides("from armillary.evaluate.report import write\n", "train", modules)
    assert not other_wings_insides("from armillary.evaluate import perplexity\n", "train", modules)
    assert not other_wings_insides("from armillary.evaluate.report import write\n", "evaluate", modules)


def test_products_go_through_the_seam() -> None:
    seam = PACKAGE / "nn" / "linear.py"
    files = [path for path in SOURCES if path.is_relative_to(PACKAGE / "nn") and path != seam]
    assert seam.is_file()
    assert _findings(bare_products, files) == []


def test_no_code_is_executed_from_data() -> None:
    assert _findings(unsafe_calls, SOURCES) == []


def test_every_file_says_what_it_is_for() -> None:
    others = [path for folder in ("tests", "benchmarks", "tools") for path in (ROOT / folder).rglob("*.py")]
    assert _findings(without_docstring, SOURCES + sorted(others)) == []


def test_no_file_is_too_long_to_read() -> None:
    assert _findings(too_long, SOURCES) == []


def test_wings_use_each_others_faces_only() -> None:
    found = []
    for wing in WINGS:
        files = sorted((PACKAGE / wing).rglob("*.py"))
        if files:  # a wing may be absent
            found += _findings(lambda text, wing=wing: other_wings_insides(text, wing, _is_module), files)
    assert found == []


# Start-up. The best of several runs counts: the suite's other worker is a load on the same cores.


def _environment(**extra: str) -> dict[str, str]:
    """As a user's shell would be, with this interpreter's commands first and no colours."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith(("PYTEST_", "COV_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), keep.get("PATH", "")])
    return keep | {"PATH": path, "PYTHONPATH": str(ROOT / "src"), "NO_COLOR": "1"} | extra


def _python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _best(measure: Callable[[], float], limit: float, tries: int = 12) -> float:
    best = float("inf")
    for _ in range(tries):
        best = min(best, measure())
        if best < limit:
            break
    return best


def test_importing_the_package_is_quick() -> None:
    code = "import time; start = time.perf_counter(); import armillary; print(time.perf_counter() - start)"
    assert _best(lambda: float(_python(code)), 0.1) < 0.1


@pytest.mark.parametrize("heavy", ["torch", "transformers", "tokenizers", "pyarrow", "numpy"])
def test_importing_the_package_imports_nothing_heavy(heavy: str) -> None:
    assert _python(f"import sys, armillary; print({heavy!r} in sys.modules)") == "False"


def test_help_is_quick() -> None:
    command = [str(Path(sys.executable).with_name("armillary"))]
    if not Path(command[0]).is_file():  # run from a source tree that is not installed
        command = [sys.executable, "-c", "import sys; from armillary.cli.main import main; sys.exit(main())"]

    def measure() -> float:
        start = time.perf_counter()
        done = subprocess.run([*command, "--help"], env=_environment(), capture_output=True, timeout=60, check=False)
        took = time.perf_counter() - start
        assert done.returncode == 0, done.stderr
        assert b"train" in done.stdout
        return took

    assert _best(measure, 0.3) < 0.3


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['armillary', '--help']\n"
        "from armillary.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'pyarrow', 'numpy'} & set(sys.modules)))"
    )
    assert _python(code).splitlines()[-1] == "[]"


# Documentation.

FENCE = re.compile(
    r"^(?P<indent> *)(?:<!-- (?P<mark>run|save)(?:: *(?P<words>[^\n]*?))? -->\n(?P=indent))?"
    r"```(?P<language>\w+)[^\n]*\n(?P<body>.*?)^(?P=indent)```$",
    re.MULTILINE | re.DOTALL,
)
MARK = re.compile(r"^ *<!-- (?:run|save)\b", re.MULTILINE)


@dataclass(frozen=True)
class Shown:
    """A block that a page marks: its line, the commands to run, or the file to write it to."""

    line: int
    commands: tuple[str, ...] = ()
    file: str | None = None
    body: str = ""


def marked(page: str) -> list[Shown]:
    """The blocks right below `<!-- run -->`, `<!-- run: words -->` or `<!-- save: file -->`.

    In `console` blocks the lines that start with `$ ` are commands and the rest is what they print;
    in `bash` blocks every line is a command; a `python` block is one program. The words of a `run`
    are added to every command of its block: overrides that make it small enough to test.
    """
    blocks = []
    for match in FENCE.finditer(page):
        language, words = match["language"], match["words"] or ""
        body = textwrap.dedent(match["body"])
        line = page.count("\n", 0, match.start()) + 1
        if match["mark"] == "save":
            blocks.append(Shown(line, file=words, body=body))
        elif match["mark"] == "run":
            joined = re.sub(r"\\\n\s*", "", body).splitlines()
            if language == "console":
                commands = [text[2:] for text in joined if text.startswith("$ ")]
            elif language == "bash":
                commands = [text for text in joined if text.strip() and not text.startswith("#")]
            elif language == "python":
                commands = [f"python -c {shlex.quote(body)}"]
            else:
                raise ValueError(f"a block to run must be console, bash or python, not {language}")
            if not commands:
                raise ValueError(f"line {line}: a block to run without a command")
            if words:
                commands = [f"{_without_comment(command)} {words}" for command in commands]
            blocks.append(Shown(line, tuple(commands)))
    return blocks


def _without_comment(line: str) -> str:
    """The command less a `# remark` after it, which would swallow what is added."""
    return re.sub(r"\s+#\s.*$", "", line)


def test_marked_blocks_are_read() -> None:
    page = (
        "<!-- run: a=1 -->\n```console\n$ armillary show x   # a remark\nprinted\n$ echo \\\n    hi\n```\n"
        "```bash\nnot run\n```\n"
        "1. in a list\n\n   <!-- save: a.txt -->\n   ```text\n   hi\n     there\n   ```\n"
        "<!-- run -->\n```python\nprint('ö')\n```\n"
    )
    first, saved, second = marked(page)
    assert first.commands == ("armillary show x a=1", "echo hi a=1")
    assert (saved.file, saved.body) == ("a.txt", "hi\n  there\n")
    assert shlex.split(second.commands[0]) == ["python", "-c", "print('ö')\n"]
    with pytest.raises(ValueError, match="must be"):
        marked("<!-- run -->\n```yaml\na: 1\n```\n")


RUNNING = [page for page in PAGES if marked(page.read_text(encoding="utf-8"))]


def test_every_mark_stands_before_a_block() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        assert len(MARK.findall(text)) == len(marked(text)), page


def test_the_readme_shows_commands_that_are_run() -> None:
    assert ROOT / "README.md" in RUNNING


def make_corpus(folder: Path) -> None:
    """Some text to train on: this project's own pages, and a part of its sources."""
    folder.mkdir()
    for path in [*PAGES, *SOURCES[::5]]:
        shutil.copy(path, folder / "-".join(path.relative_to(ROOT).parts))


@pytest.mark.timeout(180)
@pytest.mark.parametrize("page", RUNNING, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_shown_commands_work(page: Path, tmp_path: Path) -> None:
    """Every marked block of a page, in order, in one folder that holds `corpus/`; all must succeed."""
    make_corpus(tmp_path / "corpus")
    home = tmp_path / "home"
    home.mkdir()
    environment = _environment(HOME=str(home), OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")
    for block in marked(page.read_text(encoding="utf-8")):
        if block.file is not None:
            (tmp_path / block.file).write_text(block.body, encoding="utf-8")
        for command in block.commands:
            done = subprocess.run(
                ["bash", "-euo", "pipefail", "-c", command],
                cwd=tmp_path,
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            shown = f"{page.name}:{block.line}: {command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
            assert done.returncode == 0, shown
            assert "Traceback" not in done.stderr, shown


LINK = re.compile(r"\[[^\]]+\]\((?!https?://|mailto:|#)([^)#\s]+)(?:#[^)]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = [target for target in LINK.findall(text) if not (page.parent / target).exists()]
    assert missing == []


def test_shown_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        shown = set(re.findall(r"\bmake ([a-z]+)\b", _blocks(page.read_text(encoding="utf-8"))))
        assert shown <= targets, page


def _blocks(text: str) -> str:
    return "\n".join(match["body"] for match in FENCE.finditer(text) if match["language"] in ("bash", "console"))


def test_every_dependency_has_its_reason() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = [*project["dependencies"], *(item for extra in project["optional-dependencies"].values() for item in extra)]
    names = {re.split(r"[\[<>=!~; ]", item)[0] for item in asked} - {"armillary"}
    reasons = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = {_normal(line.partition("==")[0]) for line in pins.splitlines() if "==" in line}
    assert {name for name in names if f"`{name}`" not in reasons} == set()
    assert {name for name in names if _normal(name) not in pinned} == set()


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_the_wheel_holds_the_package_and_the_recipes(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        timeout=60,
        check=True,
    )
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    sources = {f"armillary/{path.relative_to(PACKAGE).as_posix()}" for path in SOURCES}
    recipes = {f"armillary/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert recipes
    assert sources | recipes | {"armillary/py.typed"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]
