"""Models with adapters over HTTP and on the command line: `base:adapter`.

Expected answers are those of a server whose model has the merged weights, W + (alpha / r) · B A."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
import torch
from safetensors.torch import save_file
from server_parts import KEYS, Served, hosted
from typer.testing import CliRunner

import armillary
from armillary.base.errors import InputError
from armillary.checkpoints.adapters import read_adapter
from armillary.engine.core import Engine
from armillary.model import Model
from armillary.nn.linear import Linear
from armillary.server import Door, Hosted, Load, Server

ASK = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "max_tokens": 20}


def folder(path, network, seed: int) -> dict:
    """An adapter of all products but the head, whose weights are the embedding's."""
    generator = torch.Generator().manual_seed(seed)
    tensors, pairs = {}, {}
    for name, module in network.named_modules():
        if type(module) is Linear and not name.startswith("head"):
            a = torch.randn(2, module.inputs, generator=generator) / 2
            b = torch.randn(module.outputs, 2, generator=generator) / 2
            pairs[name] = a, b
            tensors |= {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 6}))
    return pairs


def merged(network, pairs):
    found = copy.deepcopy(network)
    with torch.no_grad():
        for name, (a, b) in pairs.items():
            found.get_submodule(name).weight += 3 * b @ a
    return found


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A server with two adapters, and one whose models are merged."""
    base = hosted()
    models, apart = [base], [hosted()]
    for seed, name in enumerate(("law", "care")):
        place = tmp_path_factory.mktemp("adapters") / name
        pairs = folder(place, base.network, seed)
        models.append(base.adapted(name, read_adapter(place, base.network)))
        network = merged(base.network, pairs)
        engine = Engine(network, base.tokenizer, slots=4).start()
        apart.append(Hosted(f"tiny:{name}", network, base.tokenizer, engine, Load(16)))
    one, other = Served(Server(models, Door(KEYS))), Served(Server(apart, Door(KEYS)))
    yield one, other
    one.close()
    other.close()


def test_answers_at_once_are_those_of_merged_weights(both) -> None:
    served, apart = both

    def text(server, name, **more):
        found = server.client().chat.completions.create(model=name, **ASK | more)
        return found.model, found.choices[0].message.content

    names = ["tiny", "tiny:law", "tiny:care"] * 2
    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(lambda name: text(served, name), names))
    assert found == [text(apart, name) for name in names]
    assert len(set(found)) == 3, "each says something else"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "boolean"}}}
    assert text(served, "tiny:law", response_format=schema)[1] in ("true", "false")
    served.quiet()


def test_vectors_have_the_adapter_too(both) -> None:
    for name in ("tiny", "tiny:law"):
        found, expected = (
            server.client().embeddings.create(model=name, input="hello").data[0].embedding for server in both
        )
        assert found == pytest.approx(expected, abs=1e-4)


def test_they_are_listed_with_their_parent(both) -> None:
    served, _ = both
    found = {one.id: getattr(one, "parent", None) for one in served.client().models.list()}
    assert found == {"tiny": None, "tiny:law": "tiny", "tiny:care": "tiny"}
    assert served.client().models.retrieve("tiny:law").parent == "tiny"


def test_prefixes_are_not_shared(both) -> None:
    served, _ = both

    def reused(name):
        ask = ASK | {"messages": [{"role": "user", "content": "a prompt of its own"}]}
        return served.client().chat.completions.create(model=name, **ask).usage.prompt_tokens_details.cached_tokens

    assert [reused(name) for name in ("tiny", "tiny:law", "tiny:care")] == [0, 0, 0]
    assert all(reused(name) > 0 for name in ("tiny", "tiny:law", "tiny:care"))


@pytest.mark.parametrize(
    "name, message", [("tiny:tax", "'tiny' has no adapter 'tax'"), ("huge:law", "no model 'huge:law'")]
)
def test_unknown_ones_are_named(both, name, message) -> None:
    served, _ = both
    with pytest.raises(openai.NotFoundError, match=message) as caught:
        served.client().chat.completions.create(model=name, **ASK)
    assert caught.value.param == "model" and caught.value.code == "model_not_found"
    assert "tiny:law" in str(caught.value)


def test_places_are_counted_once(both) -> None:
    served, _ = both
    served.quiet()
    text = httpx.get(f"{served.url}/metrics", headers={"authorization": "Bearer secret-of-a"}).text
    assert 'armillary_running{model="tiny"}' in text
    assert 'armillary_running{model="tiny:law"}' not in text


def test_the_commands(tmp_path) -> None:
    """serve --adapter and generate --adapter on a saved model say the same."""
    from armillary.cli.main import app

    one = hosted()
    one.engine.close()
    armillary.save(Model(one.network, one.tokenizer), tmp_path / "tiny")
    pairs = folder(tmp_path / "law", one.network, 1)
    command = ["generate", str(tmp_path / "tiny"), "ab", "--tokens", "8", "--temperature", "0", "--json"]
    plain, found = (
        json.loads(CliRunner().invoke(app, command + more).stdout)["text"]
        for more in ([], ["--adapter", str(tmp_path / "law")])
    )
    expected = Model(merged(one.network, pairs), one.tokenizer)
    assert found == expected.generate("ab", max_new_tokens=8, temperature=0).text
    assert found != plain
    command = [sys.executable, "-m", "armillary", "serve", str(tmp_path / "tiny"), "--port", "0"]
    command += ["--adapter", str(tmp_path / "law")]  # called as its folder is
    refused = subprocess.run([*command, "--adapter", f"law={tmp_path / 'law'}"], capture_output=True, text=True)
    assert refused.returncode == 2 and "one name" in refused.stderr
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    try:
        line = process.stderr.readline()
        while "serving tiny, tiny:law on" not in line:
            assert line, "the server ended before it served"
            line = process.stderr.readline()
        client = openai.OpenAI(base_url=line.split(" on ")[1].strip(), api_key="none", max_retries=0)
        for name, expected in (("tiny", plain), ("tiny:law", found)):
            done = client.completions.create(model=name, prompt="ab", max_tokens=8, temperature=0)
            assert done.choices[0].text == expected
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()


@pytest.mark.parametrize(
    "given, names, message",
    [
        ("law=x", ["a", "b"], "does not say of which model"),
        ("c:law=x", ["a", "b"], "no model 'c'"),
        ("la w=PLACE", ["a"], "no name of an adapter"),
    ],
)
def test_options_that_cannot_work_are_refused(given, names, message, tmp_path) -> None:
    from armillary.cli.serving import adapted

    one = hosted()
    folder(tmp_path / "law", one.network, 1)
    models = [Hosted(name, one.network, one.tokenizer, one.engine, one.load) for name in names]
    with pytest.raises(InputError, match=message):
        adapted(given.replace("PLACE", str(tmp_path / "law")), models)
    one.close()
