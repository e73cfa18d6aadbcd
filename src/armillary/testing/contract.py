"""Laws of the contract: recipes, builds without storage, and refusing what was not declared."""

from __future__ import annotations

import json
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from armillary.base.errors import SettingsError
from armillary.base.settings import json_schema, parse
from armillary.nn.context import Context, Memory
from armillary.nn.driver import DriverSettings
from armillary.nn.mask import Mask
from armillary.nn.mechanism import (
    MechanismSettings,
    MixerSettings,
    Order,
    Place,
    Position,
    PositionSettings,
    initialise,
)
from armillary.testing.cases import HOST, SOURCE, WIDTH, Case, Trial
from armillary.testing.compare import near, refuses, require, same


def recipe(case: Case) -> None:
    """Settings become plain data and back, with defaults and without, and the JSON Schema knows them."""
    settings: MechanismSettings = case.example.settings
    require(type(settings).source != "", "settings name no source (authors, year, title)")
    for name, field in type(settings).model_fields.items():
        require(bool(field.description), f"the key '{name}' has no description")
    base: type[Any] = next(c for c in type(settings).__mro__ if "choices" in vars(c))
    for defaults in (True, False):
        data = json.loads(json.dumps(settings.to_data(defaults=defaults)))
        require(parse(base, data) == settings, f"read back from {data} the settings differ")
    data = settings.to_data()
    require(data.get("kind") == case.name, f"the data calls itself {data.get('kind')!r}")
    try:
        parse(base, {**data, "no_such_key": 1})
    except SettingsError:
        pass
    else:
        require(False, "an unknown key was accepted")
    schema = json_schema(type(settings))
    require(set(schema["properties"]) == set(data), "the JSON Schema and the data have different keys")
    _validate(data, schema)


def _validate(data: dict[str, Any], schema: dict[str, Any]) -> None:
    try:
        import jsonschema  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        return  # the validator is no dependency; where it is there, it is asked
    jsonschema.validate(json.loads(json.dumps(data)), schema)


def meta(case: Case) -> None:
    """Built and called without storage: the same names, shapes and types as for real."""
    real = case.build()
    with torch.device("meta"):
        shape: Any = case.bare()
    ours = {name: (tuple(p.shape), p.dtype) for name, p in shape.state_dict().items()}
    wanted = {name: (tuple(p.shape), p.dtype) for name, p in real.state_dict().items()}
    require(ours == wanted, f"parameters differ: {sorted(set(ours.items()) ^ set(wanted.items()))}")
    stored = [name for name, p in [*shape.named_parameters(), *shape.named_buffers()] if not p.is_meta]
    require(not stored, f"with storage on the meta device: {', '.join(stored)}")
    trial = Trial(case)
    expected = trial.whole()
    memory = None if trial.memory is None else Memory(trial.memory.hidden.to("meta"))
    side = {name: tensor.to("meta") for name, tensor in trial.side.items()}
    y = shape(trial.x.to("meta"), Context(memory=memory, side=side))
    require((y.shape, y.dtype) == (expected.shape, expected.dtype), "a call without storage gives another shape")
    if case.extends and not case.reads and case.order != "prefix":  # a prefix's length is data
        state = shape.init_state(trial.batch, 4, torch.float32, "meta", memory)
        for start in (0, 5):
            places = torch.arange(start, start + 5, device="meta")[None]
            ctx = Context(positions=places, memory=memory, side=side)
            y = shape.extend(trial.x[:, :5].to("meta"), state, ctx)
            require(y.shape == expected[:, :5].shape, "extend without storage gives another shape")
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        y = case.bare()(mode.from_tensor(trial.x), trial.ctx())
        require(y.shape == expected.shape, "a call over fake tensors gives another shape")


class _Hidden(Mask):
    """Nobody sees key 1, except its own query."""

    def rows(self, q: Tensor, k: Tensor) -> Tensor:
        return ((k[None] != 1) | (q[:, None] == k[None]))[None, None]


def unsupported(case: Case) -> None:
    """What was not declared raises; what cannot be asked of any mixer raises too."""
    settings, can = case.settings, case.can
    assert isinstance(settings, MixerSettings)
    for order in get_args(Order):
        if not getattr(can, order):
            refuses(partial(settings.build, Place(WIDTH, order=order)), f"order {order}")
    if not can.cross:
        refuses(partial(settings.build, Place(WIDTH, cross=True)), "looking at a memory")
    trial = Trial(case)
    with torch.no_grad():
        refuses(lambda: trial.whole(lengths=torch.tensor([12, 3, 2])), "lengths in forward")
        for name in trial.side:
            rest = {other: tensor for other, tensor in trial.side.items() if other != name}
            refuses(partial(trial.whole, side=rest), f"a missing side tensor '{name}'")
        for name in can.side:
            require(name in trial.side, f"the side tensor '{name}' is declared but the example does not make it")
        if case.cross:
            refuses(lambda: trial.whole(memory=None), "cross without a memory")
            refuses(lambda: trial.module.init_state(3, 4, torch.float32, "cpu", None), "a state without its memory")
        else:
            memory = Memory(torch.zeros(3, SOURCE, WIDTH))
            refuses(lambda: trial.whole(memory=memory), "a memory given to a mixer that does not look at one")
        _masked(trial)
        if not case.extends:
            refuses(lambda: trial.state(), "a state for a mixer that sees both ways")
            return
        extras: dict[str, Any] = {
            "documents": torch.zeros(3, 2, dtype=torch.int64),
            "padding": torch.ones(3, 2, dtype=torch.bool),
            "mask": _Hidden(),
        }
        for name, value in extras.items():
            refuses(partial(trial.extend, trial.state(), trial.x[:, :4], 0, **{name: value}), f"{name} in extend")
        if case.order == "prefix":
            trial.side = {"prefix": torch.tensor([4, 4, 4])}
            state = trial.state()
            refuses(lambda: trial.fill(state, 2), "a prefix in two chunks")


def refusals(case: Case) -> None:
    """A driver refuses orders that it does not declare, and what belongs to single mixers of its stack."""
    settings = case.settings
    assert isinstance(settings, DriverSettings)
    for order in get_args(Order):
        if not getattr(case.can, order):
            refuses(partial(settings.build, Place(WIDTH, order=order), HOST), f"order {order}")
    trial = Trial(case)
    with torch.no_grad():
        refuses(lambda: trial.whole(lengths=torch.tensor([12, 3, 2])), "lengths in forward")
        refuses(lambda: trial.whole(mask=_Hidden()), "a mask from the objective")
        refuses(lambda: trial.whole(side={"marks": torch.zeros(3, 12)}), "a side tensor")
        refuses(lambda: trial.whole(memory=Memory(torch.zeros(3, SOURCE, WIDTH))), "an encoder's memory")
        if not case.extends:
            refuses(lambda: trial.state(), "a state for a stack that sees both ways")
            return
        padding = torch.ones(3, 4, dtype=torch.bool)
        refuses(lambda: trial.extend(trial.state(), trial.x[:, :4], 0, padding=padding), "padding in extend")


def _masked(trial: Trial) -> None:
    if trial.case.cross or not trial.case.can.mask:
        refuses(lambda: trial.whole(mask=_Hidden()), "a mask from the objective")
        return
    for length in (20, 6):
        other = Trial(trial.case, length=length)
        base = other.whole(mask=_Hidden())
        x = other.x.clone()
        x[:, 1] = 40 * other.noise(*x[:, 1].shape)
        change = (other.whole(x, mask=_Hidden()) - base).abs().amax((0, 2))
        free = (other.whole(x) - other.whole()).abs().amax((0, 2))[1]
        require(float(change[1]) > 0 or float(free) == 0, "a token does not see itself")
        change[1] = 0
        require(float(change.max()) <= 1e-6, f"a key hidden by the objective's mask changed outputs by {change.max()}")
        require(bool((other.whole() != base).any()), "the objective's mask changes nothing")


def mask(case: Case) -> None:
    """No mask is in the way of what works within a position; a channel mixer whose tokens compete refuses one."""
    trial = Trial(case)
    with torch.no_grad():
        if not case.can.mask:
            refuses(lambda: trial.whole(mask=_Hidden()), "a mask from the objective")
            return
        base = trial.whole(mask=_Hidden())
        same(base, trial.whole(), "under a mask from the objective")
        x = trial.x.clone()
        x[:, 1] = trial.x[:, :1].mean((0, 1))
        found = trial.whole(x, mask=_Hidden())
        found[:, 1] = base[:, 1]
        same(found, base, "beside another token in a hidden place")


def sites(case: Case) -> None:
    """A position acts at the sites that it names, on any positions, and refuses the others."""
    settings = case.example.settings
    assert isinstance(settings, PositionSettings)
    heads, width, length = 2, 8, 6
    position: Position = settings.build(case.place(), heads, width)
    if any(True for _ in position.parameters()):
        initialise(position, 1)
    require(type(position).sites == settings.sites, "module and settings name different sites")
    generator = torch.Generator().manual_seed(1)
    q = torch.randn(2, length, heads, width, generator=generator)
    k = torch.randn(2, length, 1, width, generator=generator)
    places = torch.stack([2 * torch.arange(length) + 3, torch.arange(length)])

    def call(site: str, rows: slice) -> tuple[Tensor, ...]:
        here = places[rows]
        if site == "rotate":
            return position.rotate(q[rows], k[rows], here)
        if site == "relate":
            met, scores = position.relate(q[rows], here, here)
            return met, scores(torch.arange(length), torch.arange(length))
        found: Tensor = position.bias(here, here) if site == "bias" else getattr(position, site)(here)
        return (found,)

    shapes: dict[str, tuple[tuple[int, ...], ...]] = {
        "embed": ((2, length, WIDTH),),
        "rotate": (tuple(q.shape), tuple(k.shape)),
        "bias": ((2, heads, length, length),),
        "relate": (tuple(q.shape), (2, heads, length, length)),
        "decay": ((2, length, heads),),
    }
    require(settings.sites <= set(shapes), f"unknown sites: {', '.join(settings.sites - set(shapes))}")
    for site, expected in shapes.items():
        if site not in settings.sites:
            refuses(partial(call, site, slice(None)), f"the site '{site}'")
            continue
        for found, shape, first, second in zip(
            call(site, slice(None)), expected, call(site, slice(1)), call(site, slice(1, 2)), strict=True
        ):
            require(tuple(found.shape) == shape, f"'{site}' gives {tuple(found.shape)}, expected {shape}")
            # scores by content are products, whose last digits depend on the number of rows
            alike = near if site == "relate" else same
            alike(torch.cat([first, second]), found, f"'{site}' of rows alone")
            require(not torch.equal(first, second), f"'{site}' does not depend on the position")
