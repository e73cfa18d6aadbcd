"""A bound in time for what is over at once as a rule: a timer is set only where something has to be waited for."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Generator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


def within(seconds: float, work: Awaitable[T]) -> Awaitable[T]:
    """What the work gives; awaiting it raises TimeoutError when that takes longer."""
    return _Within(seconds, work)


def begun(work: Awaitable[T]) -> Awaitable[T] | None:
    """Outside of any task: what is left of the work, to be awaited in one; None: it is over already."""
    inner: Any = work.__await__()
    try:
        return _Rest(inner, inner.send(None))
    except StopIteration:
        return None


class _Within(Generic[T]):
    def __init__(self, seconds: float, work: Awaitable[T]) -> None:
        self._seconds, self._work = seconds, work

    def __await__(self) -> Generator[Any, Any, T]:
        work: Any = self._work.__await__()
        try:
            waited = work.send(None)
        except StopIteration as done:
            result: T = done.value
            return result
        return (yield from self._bounded(work, waited).__await__())

    async def _bounded(self, work: Any, waited: Any) -> T:
        async with asyncio.timeout(self._seconds):
            return await _Rest[T](work, waited)


class _Rest(Generic[T]):
    """Work that has begun, and what it waits for."""

    def __init__(self, work: Any, waited: Any) -> None:
        self._work, self._waited = work, waited

    def __await__(self) -> Generator[Any, Any, T]:
        waited = self._waited
        try:
            while True:
                try:
                    given = yield waited
                except BaseException as error:
                    waited = self._work.throw(error)
                else:
                    waited = self._work.send(given)
        except StopIteration as done:
            result: T = done.value
            return result
