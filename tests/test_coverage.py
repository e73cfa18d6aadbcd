"""Generated pages of docs/ say what code and results say, and notice when they do not."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ROOT / "tools"


def _tool(name: str) -> ModuleType:
    """A tool as a module; under a name of its own, since `coverage` is also that of a known package."""
    spec = importlib.util.spec_from_file_location(f"armillary_tool_{name}", TOOLS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tools() -> Iterator[dict[str, ModuleType]]:
    sys.path.insert(0, str(TOOLS))
    try:
        names = ("results", "coverage", "models", "performance", "campaigns", "reliability")
        yield {name: _tool(name) for name in names}
    finally:
        sys.path.remove(str(TOOLS))
        sys.modules.pop("results", None)


def test_the_page_is_that_of_the_code(tools: dict[str, ModuleType]) -> None:
    page = (ROOT / "docs" / "coverage.md").read_text(encoding="utf-8")
    assert not tools["coverage"].stale(page), "run python tools/coverage.py"


def test_a_stale_page_is_noticed(tools: dict[str, ModuleType]) -> None:
    text = tools["coverage"].page()
    assert not tools["coverage"].stale(text)
    assert tools["coverage"].stale(text.replace("| `retention` |", "| `retention2` |"))  # a name
    assert tools["coverage"].stale(text.replace(", causality,", ",", 1))  # a law
    assert not tools["coverage"].stale(text.replace("## Figures", "## Figures\n\nanything"))  # figures may change


def test_every_registered_name_is_there_with_its_oracle(tools: dict[str, ModuleType]) -> None:
    coverage = tools["coverage"]
    for registry in coverage.REGISTRIES:
        for name, settings in registry:
            named = re.findall(r"tests/[\w/]+\.py", settings.oracle)
            assert named, f"{registry.role} '{name}' does not say which test compares it with what (oracle)"
            for path in named:
                assert (ROOT / path).is_file(), f"{registry.role} '{name}': there is no {path}"
            assert settings.oracle.partition(": ")[2], f"{registry.role} '{name}': compared with what?"


def test_recipes_are_found_in_nested_choices(tools: dict[str, ModuleType]) -> None:
    found = tools["coverage"].used_by()
    assert "hybrid" in found["mixer", "retention"] and "hybrid" in found["mixer", "attention"]
    assert found["position", "t5"] == ["t5"]  # also inside the encoder's block
    assert "bert" in found["objective", "masked"] and "quick" not in found["objective", "masked"]


def test_results_are_judged_by_their_goal(tools: dict[str, ModuleType], tmp_path: Path) -> None:
    results = tools["results"]
    reach = {"speed": {"bound": 1.2, "kind": "min"}, "memory": {"bound": 0.6, "kind": "max"}}
    lines = [
        {"benchmark": "a", "figures": {"speed": 9.0}, "reach": {}},
        {"benchmark": "a", "figures": {"speed": 1.1, "memory": 0.6, "other": 3}, "reach": reach},
    ]
    file = tmp_path / "results.jsonl"
    file.write_text("\n".join(json.dumps(line) for line in lines) + "\n")
    (record,) = results.latest(file)
    assert results.judged(record, "speed") == ("≥ 1.2", "**missed**")
    assert results.judged(record, "memory") == ("≤ 0.6", "reached")
    assert results.judged(record, "other") == ("", "")
    assert results.latest(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize("name", ["performance", "reliability"])
def test_a_page_holds_the_figures(tools: dict[str, ModuleType], tmp_path: Path, name: str) -> None:
    """The page is that of the results at some time; what a benchmark added since may not be on it yet."""
    results = tools["results"]
    page = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    lines = results.RESULTS.read_text(encoding="utf-8").splitlines() if results.RESULTS.is_file() else []
    file = tmp_path / "results.jsonl"
    for count in range(len(lines), -1, -1):
        file.write_text("\n".join(lines[:count]))
        if page == tools[name].page(results.latest(file)):
            return
    pytest.fail(f"docs/{name}.md is not what was measured: run python tools/{name}.py")


def test_the_page_of_models_is_what_was_measured(tools: dict[str, ModuleType]) -> None:
    """Which cases and families those are is the business of tests/checkpoints: test_parity.py, test_encoders.py."""
    models = tools["models"]
    both = [json.loads(path.read_text(encoding="utf-8")) for path in (models.MEASURED, models.ENCODERS)]
    assert models.PAGE.read_text(encoding="utf-8") == models.page(*both), "run python tools/models.py"
    figures = [found for part in both for variants in part["families"].values() for found in variants.values()]
    assert max(max(found["logits"], found["hidden"]) for found in figures) < 1e-4


def test_a_missed_goal_is_said_and_a_remark_stands_below(
    tools: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    performance = tools["performance"]
    monkeypatch.setattr(performance, "REMARKS", tmp_path / "remarks.md")
    (tmp_path / "remarks.md").write_text("# Remarks\n\n## training\n\nWhat the profile shows.\n")
    record = {
        "benchmark": "training",
        "time": "2030-01-02T03:04:05Z",
        "processor": "P",
        "threads": 1,
        "torch": "2",
        "figures": {"speed": 1.0},
        "reach": {"speed": {"bound": 1.25, "kind": "min"}},
    }
    page = performance.page([record])
    assert "| speed | 1 | ≥ 1.25 | **missed** |" in page
    assert page.index("2030-01-02, P, 1 thread, PyTorch 2.") < page.index("What the profile shows.")


def test_parts_that_did_not_run_say_so(tools: dict[str, ModuleType]) -> None:
    reliability = tools["reliability"]
    record = {
        "benchmark": "reliability_storm",
        "time": "2030-01-02T03:04:05Z",
        "processor": "P",
        "threads": 1,
        "torch": "2",
        "figures": {"running afterwards": 1.0},
        "reach": {"running afterwards": {"bound": 0, "kind": "max"}},
    }
    page = reliability.page([record])
    assert page.count("Not run yet.") == len(reliability.PARTS) - 1
    assert "| running afterwards | 1 | ≤ 0 | **missed** |" in page
    assert "2030-01-02, P, 1 thread, PyTorch 2." in page
    assert "running afterwards" not in tools["performance"].page([record])


def test_the_check_ends_with_its_status() -> None:
    """As CI calls it: 0 for the page as it is."""
    done = subprocess.run(
        [sys.executable, str(TOOLS / "coverage.py"), "--check"],
        env={"PYTHONPATH": str(ROOT / "src"), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_campaign_has_a_page_and_a_drawing(tools: dict[str, ModuleType]) -> None:
    """Differences 1, 2 and 3 % of 2 bits: mean 2, and 4.3027 · 1 / √3 on either side (Student's t, 3 seeds)."""
    campaigns = tools["campaigns"]
    arms = {"reference": [2.0, 2.0, 2.0], "candidate": [2.02, 2.04, 2.06]}
    record = {
        "benchmark": "campaign_a_b", "time": "2026-01-02T03:04:05Z", "processor": "one", "about": "What\nis claimed.",
        "arms": arms, "base": "reference", "budget": {"steps": 3}, "figures": {"removed": 0.3},
        "reach": {"removed": {"bound": 0.25, "kind": "min"}},
    }  # fmt: skip
    assert campaigns.apart(record)["candidate"] == pytest.approx(
        (2.0, 2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), rel=1e-4
    )
    page = campaigns.page("a_b", record, "Why.")
    assert page.startswith("# A b\n\nWhat is claimed.\n") and page.endswith("\n\nWhy.\n")
    assert "+2.00% (-0.48 to +4.48)" in page and "| removed | 0.3 | ≥ 0.25 | reached |" in page
    ElementTree.fromstring(campaigns.drawing(record))
    assert campaigns.drawing(record | {"arms": {}}) is None


def test_the_pages_of_campaigns_are_what_was_measured(tools: dict[str, ModuleType]) -> None:
    campaigns = tools["campaigns"]
    found = {path.name: path.read_text(encoding="utf-8") for path in campaigns.FOLDER.iterdir()}
    assert found == campaigns.pages(), "run python tools/campaigns.py"
