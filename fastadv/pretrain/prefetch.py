"""Make the next steps' batches in a thread while the device computes this one's."""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

Item = TypeVar("Item")

_WAIT = 0.1  # seconds between two looks at whether anybody still wants items


class _End:
    """What comes after the last item: the error that ended them, or None."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


def ahead(items: Iterator[Item], depth: int) -> Iterator[Item]:
    """Give the items of an iterator, of which a thread has made up to `depth` already. Its error is raised here."""
    made: queue.Queue[Item | _End] = queue.Queue(depth)
    left = threading.Event()

    def put(item: Item | _End) -> None:
        while not left.is_set():
            with contextlib.suppress(queue.Full):
                made.put(item, timeout=_WAIT)
                return

    def work() -> None:
        error: BaseException | None = None
        try:
            for item in items:
                put(item)
                if left.is_set():
                    return
        except BaseException as raised:  # noqa: BLE001 - it belongs to who asks for the next item
            error = raised
        put(_End(error))

    thread = threading.Thread(target=work, name="fastadv-rows", daemon=True)
    thread.start()
    try:
        while not isinstance(item := made.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        left.set()
        thread.join()
