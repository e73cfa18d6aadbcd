"""What the C library and Python both write down, records, rows and the numbers of codes, is alike or an error."""

from __future__ import annotations

from collections.abc import Iterator
from ctypes import c_int64, c_void_p
from typing import Any

import pytest
from native_parts import library

from armillary.native import available, choice, tape

pytestmark = pytest.mark.skipif(not available(), reason="there is no C compiler here")
MIRRORS: dict[str, tuple[Any, str]] = {"tape_run": (tape._MIRROR, "APPEND"), "choose_rows": (choice._MIRROR, "FORBID")}


@pytest.fixture(autouse=True)
def anew() -> Iterator[None]:
    """As if nothing of the library had been called yet."""
    functions = dict(library._functions)
    library._functions.clear()
    yield
    library._functions.clear()
    library._functions.update(functions)


@pytest.mark.parametrize("name", MIRRORS)
def test_both_are_alike(name: str) -> None:
    library.function(name, [], None, MIRRORS[name][0])
    assert len(MIRRORS[name][0][1]) > 30


@pytest.mark.parametrize("name", MIRRORS)
def test_another_number_a_missing_one_and_one_too_many_are_errors(name: str) -> None:
    (table, ours), one = MIRRORS[name]
    without = {key: value for key, value in ours.items() if key != one}
    for wrong in ({**ours, one: 99}, without, {**ours, "MORE": 1}):
        with pytest.raises(RuntimeError, match="MORE is 1 and None" if "MORE" in wrong else f"{one} is (99|None) and"):
            library.function(name, [], None, (table, wrong))
        assert name not in library._functions


def test_members_that_changed_places_are_an_error() -> None:
    """Of one size, so that the whole has the same size, too."""
    fields = dict(tape.Call._fields_)
    order = ["picks", "rows", *list(fields)[2:]]
    swapped = type("Call", (tape.Structure,), {"_fields_": [(field, fields[field]) for field in order]})
    wrong = {**tape._MIRROR[1], **library.members("call_t", swapped)}
    with pytest.raises(RuntimeError, match=r"call_t\.rows is 8 and 0, call_t\.picks is 0 and 8"):
        library.function("tape_run", [], None, ("tape_mirror", wrong))


def test_a_function_keeps_its_types_whatever_else_asks_for_it() -> None:
    """Without them a pointer is taken for a number of 32 bits."""
    first = library.function("tape_run", [c_void_p, c_int64, c_void_p, c_int64])
    library._functions.clear()
    library.function("tape_run", [])
    assert list(first.argtypes) == [c_void_p, c_int64, c_void_p, c_int64]
