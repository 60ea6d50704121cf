"""Work that several rewards of one call have in common is done once."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_store: ContextVar[dict[Hashable, Any] | None] = ContextVar("shared_features", default=None)


@contextmanager
def shared_features() -> Iterator[None]:
    """Within it, rewards share resized pixels and image features; at its end all are let go (they carry graphs). Nests."""
    if _store.get() is not None:
        yield
        return
    token = _store.set({})
    try:
        yield
    finally:
        _store.reset(token)


def once(key: tuple, owner: Any, make: Callable[[], Any]) -> Any:
    """make(), or what it gave before for this key within :func:`shared_features`. The owner lives as long as the value."""
    store = _store.get()
    if store is None:
        return make()
    key = (id(owner), *key)
    if key not in store:
        store[key] = (owner, make())
    return store[key][1]
