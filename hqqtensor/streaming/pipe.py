"""A queue between two threads that holds a bounded number of bytes, and passes errors on."""

import threading
from collections import deque
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Stopped(Exception):
    """The other side of a pipe has stopped; why is told there."""


class Pipe(Generic[Item]):
    """From one thread to another: up to ``limit`` bytes on the way, or one item of more.

    The sender reserves the bytes of an item before it makes it. What the receiver has in its hands does not count, so
    that the next large item is made meanwhile.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._items: deque[tuple[Item, int]] = deque()
        self._held = 0
        self._ended = self._stopped = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()

    def reserve(self, nbytes: int) -> None:
        """Wait until ``nbytes`` more are within the bound; Stopped where nobody receives any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._held or self._held + nbytes <= self.limit)
            if self._stopped:
                raise Stopped
            self._held += nbytes

    def wait_until_few(self, count: int) -> None:
        """Wait until fewer than ``count`` items are on the way; Stopped where nobody receives any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or len(self._items) < count)
            if self._stopped:
                raise Stopped

    def send(self, item: Item, nbytes: int) -> None:
        """Pass on an item whose bytes are reserved."""
        with self._changed:
            self._items.append((item, nbytes))
            self._changed.notify_all()

    def end(self, error: BaseException | None = None) -> None:
        """Say that nothing more comes, or why."""
        with self._changed:
            self._ended, self._error = True, error
            self._changed.notify_all()

    def receive(self) -> Item | None:
        """The next item; None at the end. Raises the sender's error."""
        with self._changed:
            self._changed.wait_for(lambda: bool(self._items) or self._ended)
            if self._error is not None:
                raise self._error
            if not self._items:
                return None
            item, nbytes = self._items.popleft()
            self._held -= nbytes
            self._changed.notify_all()
            return item

    def stop(self) -> None:
        """Say that nothing more is received."""
        with self._changed:
            self._stopped = True
            self._items.clear()
            self._changed.notify_all()
