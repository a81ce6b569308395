"""Waiting that ends: requests with a time-out, and tasks that are stopped for certain.

Why our own: on Python 3.11 `asyncio.wait_for` forgets a cancellation that arrives in the same turn of the loop
as the result (github.com/python/cpython/issues/86296). A loop around it runs on, and whoever awaits that loop
after `cancel()` stands still for ever.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar

log = logging.getLogger(__name__)

_AGAIN_S = 0.1  # a task that is still there after this is cancelled once more
_T = TypeVar("_T")


async def within(request: Awaitable[_T], timeout_s: float) -> _T:
    """Await a request; TimeoutError when it takes too long. A cancellation of the caller is never lost."""
    task = asyncio.current_task()
    assert task is not None
    before = task.cancelling()
    try:
        async with asyncio.timeout(timeout_s):
            return await request
    except asyncio.CancelledError:
        if task.cancelling() <= before:  # the request's own end, not the caller's
            raise ConnectionError("the request was given up") from None
        raise
    finally:
        if task.cancelling() > before:  # whatever the request made of it
            raise asyncio.CancelledError


async def farewell(request: Coroutine[Any, Any, Any], timeout_s: float) -> None:
    """Let a last request take this long, no longer; how it ends is of no interest."""
    task = asyncio.create_task(request, name="farewell")
    try:
        await asyncio.wait({task}, timeout=timeout_s)
    finally:
        task.cancel()
        task.add_done_callback(_look_at)


def _look_at(task: asyncio.Task[Any]) -> None:
    """Take note of how a task ended, so that asyncio does not complain that nobody did."""
    if not task.cancelled():
        task.exception()


async def end_tasks(tasks: Iterable[asyncio.Task[Any] | None], timeout_s: float) -> bool:
    """Cancel tasks, again and again, until all have ended or the time is over; True when all have ended.

    Their errors are of no interest any more. A cancellation of the caller goes through.
    """
    every = {task for task in tasks if task is not None and task is not asyncio.current_task()}
    left = {task for task in every if not task.done()}
    loop = asyncio.get_running_loop()
    end = loop.time() + timeout_s
    while left:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=max(0.0, min(_AGAIN_S, end - loop.time())))
        if left and loop.time() >= end:
            log.warning("left behind, since they do not end: %s", ", ".join(task.get_name() for task in left))
            break
    for task in every - left:
        _look_at(task)
    return not left
