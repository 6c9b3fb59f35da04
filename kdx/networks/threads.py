"""Networks that several threads share: a lock, and hooks that see the calls of one thread alone."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import nn
from torch.utils.hooks import RemovableHandle


class locked:  # noqa: N801
    """Context manager: no other thread is inside such a block with any module of these networks.

    Every function of kdx that changes a network for a while, such as its mode, holds its lock so long. Networks that
    have modules in common exclude each other; others do not. A thread may enter again what it holds.

    Two threads that enter blocks of two networks inside each other, in opposite order, wait for each other for ever:
    name both at once, ``with locked(student, base):``, around them.
    """

    _guard = threading.RLock()
    _count = itertools.count()
    # A module's lock is that of the network with which it was first seen. The numbers give all threads one order.
    _locks: ClassVar[WeakKeyDictionary[nn.Module, tuple[int, Any]]] = WeakKeyDictionary()

    def __init__(self, *networks: nn.Module) -> None:
        self.networks = networks

    def __enter__(self) -> None:
        with self._guard:
            new = (next(self._count), threading.RLock())
            found = {self._locks.setdefault(module, new) for network in self.networks for module in network.modules()}
        with ExitStack() as stack:
            for _, lock in sorted(found):
                stack.enter_context(lock)
            self._held = stack.pop_all()

    def __exit__(self, *exception: object) -> None:
        self._held.close()


@contextmanager
def hooked(hooks: Iterable[tuple[str, Callable[[Any], RemovableHandle], Callable[..., Any]]]) -> Iterator[None]:
    """Inside the block modules have hooks that see the calls of this thread alone; afterwards all are removed.

    Args:
        hooks: Name of the module, method that registers a hook, and the hook.

    Raises:
        ValueError: A module that takes no hooks, or does not give them back.
    """
    thread = threading.get_ident()

    def own(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: hook(*args) if threading.get_ident() == thread else None

    with ExitStack() as stack:
        for name, register, hook in hooks:
            try:
                handle = register(own(hook))
            except Exception as error:
                raise _refused(name, "takes hooks; build it without torch.jit, or name others", error) from error
            stack.callback(_remove, name, handle)
        yield


def _remove(name: str, handle: RemovableHandle) -> None:
    try:
        handle.remove()
    except Exception as error:
        raise _refused(name, "gives its hooks back; one of kdx is left, so build the network anew", error) from error


def _refused(name: str, expected: str, error: Exception) -> ValueError:
    return ValueError(f"{name or 'the network'}: expected a module that {expected} ({error})")
