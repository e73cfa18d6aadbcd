"""config.json as published: read, counted in parameters; then shrunk, damaged in many ways, and refused in words.

The expected counts, in published.json, are those of the models that `transformers` 5.24 builds from the same
config.json, without the poolers and scores of the next sentence that are not read here. It ties the heads of Flan-T5
and mT5, which the published weights have of their own: these count one product of vocabulary and width more.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from armillary.base.errors import ArmillaryError
from armillary.checkpoints import load_open, save_open
from armillary.checkpoints.table import families
from armillary.checkpoints.tensors import INDEX
from armillary.nn.example import Example
from armillary.nn.network import ModelSettings, Network, build
from armillary.nn.stack import StackSettings
from armillary.testing.cases import Case
from armillary.testing.suite import laws_of

# By the name of the model: how many parameters it has (an encoder of sentences as a bare body), and the parts of
# its config.json that decide the computation.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    name.rpartition("/")[2]: (held["parameters"], held["config"])
    for name, held in json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8")).items()
}
SMALL = {
    ("vocab_size",): 41,
    ("hidden_size", "n_embd", "n_embed", "d_model"): 24,
    ("intermediate_size", "d_ff"): 40,
    ("num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"): 2,
    ("num_attention_heads", "n_head"): 4,
    ("num_key_value_heads",): 2,
    ("head_dim", "d_kv"): 8,
    ("d_head",): 6,
    ("rotary_pct",): 0.34,
    ("num_experts", "num_local_experts"): 4,
    ("num_experts_per_tok",): 2,
    ("moe_intermediate_size", "shared_expert_intermediate_size"): 20,
    ("d_inner",): 48,
    ("state_size", "mamba_d_state"): 6,
    ("time_step_rank", "attn_rotary_emb"): 3,
    ("num_heads", "mamba_n_heads"): 6,
    ("mamba_d_head",): 8,
    ("n_groups",): 2,
    ("attn_layer_indices",): [1],
}
# What other keys of the family ask for.
OWN: dict[str, dict[str, Any]] = {
    "mamba": {"intermediate_size": 48},
    "mamba2": {"intermediate_size": 48},
    "bamba": {"hidden_size": 32, "mamba_n_heads": 8, "attn_rotary_emb": 4},
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_settings_have_the_published_size(name: str) -> None:
    count, config = PUBLISHED[name]
    network = build(_settings(config), device="meta")
    assert sum(parameter.numel() for parameter in network.parameters()) == count


def _settings(config: dict[str, Any]) -> ModelSettings:
    """Those of a folder whose tensors agree with config.json about the head."""
    family = families.get(config["model_type"])()
    names = ("lm_head.weight",) if config.get("tie_word_embeddings") is False else ()
    return family.suit(family.settings(config, "config.json"), names)


def test_every_family_has_a_published_config() -> None:
    assert {config["model_type"] for _, config in PUBLISHED.values()} == set(families.names())


def _small(name: str) -> dict[str, Any]:
    sizes = {key: value for keys, value in SMALL.items() for key in keys}
    config = PUBLISHED[name][1]
    sizes |= OWN.get(config["model_type"], {})
    return {key: sizes.get(key, value) for key, value in config.items()}


def _parts(name: str) -> list[Case]:
    """Every kind of mixer and channel mixer of a small model, placed as it is there."""
    model = _settings(_small(name))
    stacks: list[tuple[StackSettings, str]] = [(model, "bidirectional" if model.form == "encoder" else "causal")]
    if model.encoder is not None:
        stacks.append((model.encoder, "bidirectional"))
    found: dict[str, Case] = {}
    for stack, order in stacks:
        for branch in (branch for block in stack.layers() for branch in block.all()):
            role, part = ("mixer", branch.mixer) if branch.mixer is not None else ("channel", branch.channel)
            assert part is not None
            if getattr(part, "head_width", 0) is None:  # the laws put it into a place of another width
                part = part.derive(head_width=model.width // part.heads)
            place = {"order": order, "cross": branch.look == "memory"} if role == "mixer" else {}
            found[f"{part!r} {place}"] = Case(role, part.kind, Example("imported", part, place))
    return list(found.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_is_read_obeys_the_laws(name: str) -> None:
    """The conformance suite on the parts of imported models, with the settings that their config.json gives."""
    for case in _parts(name):
        laws = laws_of(case)
        for law in ("chunking", "causality", "padding", "rollback", "cost"):
            if law in laws:
                laws[law]()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model of every published config, in its own words, in shards."""
    root = tmp_path_factory.mktemp("published")
    for name in PUBLISHED:
        config = _small(name)
        network = build(_settings(config), seed=3)
        save_open(root / name, network, family=config["model_type"], max_shard=12_000)
        (root / name / "config.json").write_text(json.dumps(config))
        (root / name / "modules.json").unlink(missing_ok=True)
        assert isinstance(load_open(root / name, "cpu").network, Network)
    return root


def _copy(source: Path, target: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A folder like `source`; its config, and which file holds which tensor."""
    target.mkdir()
    for path in source.iterdir():
        if path.is_file():
            (target / path.name).write_bytes(path.read_bytes())
    index = json.loads((target / INDEX).read_text())
    return json.loads((target / "config.json").read_text()), index["weight_map"]


TENSOR_FAULTS = ("missing", "extra", "transposed", "wrong type", "truncated", "outside")


@settings(max_examples=60)
@given(name=st.sampled_from(sorted(PUBLISHED)), fault=st.sampled_from(TENSOR_FAULTS), choice=st.integers(0, 999))
def test_a_damaged_folder_names_the_tensor(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, name: str, fault: str, choice: int
) -> None:
    folder = tmp_path_factory.mktemp("damaged") / name
    _, homes = _copy(folders / name, folder)
    shapes = {key: tensor.shape for file in set(homes.values()) for key, tensor in load_file(folder / file).items()}
    able = sorted(key for key, shape in shapes.items() if fault != "transposed" or shape[0] != shape[-1])
    if fault == "missing" and "t5" in name:  # there a head without a weight is one that is tied
        able.remove("lm_head.weight") if "lm_head.weight" in able else None
    key = able[choice % len(able)]
    file, named = folder / homes[key], key
    held = load_file(file)
    if fault == "missing":
        del held[key], homes[key]
        named = f"missing: '{key}'"
    elif fault == "extra":
        held[f"{key}.ghost"] = torch.ones(3)
        homes[f"{key}.ghost"] = file.name
        named = f"not part of the model: '{key}.ghost'"
    elif fault == "transposed":
        held[key] = held[key].transpose(0, -1).contiguous()
        named = f"'{key}' is {list(held[key].shape)}"
    elif fault == "wrong type":
        held[key] = held[key].to((torch.int64, torch.int8, torch.bool)[choice % 3])
        named = f"wrong type: '{key}'"
    elif fault == "outside":
        named = homes[key] = ("../" * (1 + choice % 3) + "elsewhere.safetensors", "/etc/passwd")[choice % 2]
    save_file(held, file) if held else file.unlink()
    if fault == "truncated":
        whole = file.read_bytes()
        file.write_bytes(whole[: choice * len(whole) // 1000])
        named = file.name
    (folder / INDEX).write_text(json.dumps({"weight_map": homes}))
    with pytest.raises(ArmillaryError) as caught:
        load_open(folder, "cpu")
    assert named in str(caught.value) and str(folder) in str(caught.value)


# 4 heads may become 3 without a contradiction, since 24 features divide into both; 5 may not.
# What changes no tensor, in any family or in those whose models here have no part that it is about.
NO_SIZES = ("rotary_pct", "num_experts_per_tok", "attn_layer_indices")
UNUSED = {("qwen2_moe", "intermediate_size"), ("qwen3_moe", "intermediate_size"), ("mamba2", "time_step_rank")}
SIZES = [
    (name, key)
    for name, (_, config) in PUBLISHED.items()
    for keys in SMALL
    for key in keys
    if key in config and key not in NO_SIZES and (config["model_type"], key) not in UNUSED
]
NEWER = {"n_embed": "hidden_size"}  # the names that messages have for them


@settings(max_examples=40)
@given(pair=st.sampled_from(SIZES), by=st.sampled_from([1, 5, 10**5]))
def test_a_contradictory_number_is_named(
    folders: Path, tmp_path_factory: pytest.TempPathFactory, pair: tuple[str, str], by: int
) -> None:
    name, key = pair
    folder = tmp_path_factory.mktemp("contradictory") / name
    config, _ = _copy(folders / name, folder)
    config[key] += by
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArmillaryError) as caught:
        load_open(folder, "cpu")
    blocks = ("missing: '", "not part of the model: '") if "layer" in key else ()
    assert any(part in str(caught.value) for part in (key, NEWER.get(key, key), *blocks))


JUNK = (None, True, False, 0, -1, 1, 7, 10**9, 10**40, 0.0, -2.5, 0.5, 1e308, float("nan"), float("inf"))
JUNK += ("", "x", "gelu", [], ["x"], [None], [[1]], {}, {"x": 1}, {"rope_type": "yarn"}, {"rope_type": ["linear"]})
JUNK += ({"rope_type": "linear", "factor": 0}, {"rope_type": "llama3", "factor": True}, {"full_attention": 3})


def _of(model: str) -> dict[str, Any]:
    return _small(next(name for name in sorted(PUBLISHED) if PUBLISHED[name][1]["model_type"] == model))


@pytest.mark.parametrize(("model", "key"), [("bamba", "num_attention_heads"), ("t5", "d_model")])
def test_sizes_that_others_are_read_by_are_refused_first(model: str, key: str) -> None:
    with pytest.raises(ArmillaryError, match=f"'{key}' is 0, expected at least 1"):
        families.get(model)().settings(_of(model) | {key: 0}, "here/config.json")


def test_the_older_name_of_a_size_serves_those_that_repeat_it() -> None:
    config = _of("mamba")
    config |= {"hidden_size": None, "d_model": config["hidden_size"], "d_inner": 2 * config["hidden_size"]}
    assert families.get("mamba")().settings(config, "here/config.json").width == config["d_model"]


@settings(max_examples=150)
@given(name=st.sampled_from(sorted(PUBLISHED)), choice=st.integers(0, 999), junk=st.sampled_from(range(len(JUNK))))
def test_junk_is_read_or_refused_in_words(folders: Path, name: str, choice: int, junk: int) -> None:
    config = _small(name)
    family = families.get(config["model_type"])()
    keys = sorted({"rope_parameters", "layer_types", *config, *(key for field in family.fields for key in field.keys)})
    config[keys[choice % len(keys)]] = JUNK[junk]
    with suppress(ArmillaryError):
        build(family.settings(config, "here/config.json"), device="meta")
