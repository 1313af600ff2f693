"""Counts the bytes of live tensors. In a `FakeTensorMode`, this works for calls too large for the machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Tracks the storages that operators allocate. Tensors that existed before are not counted.

    Attributes:
        now: live bytes.
        peak: maximum of live bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._paused = False

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Do not count tensors that are allocated in this context, because they are in another memory."""
        before, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = before

    def ignore(self, tensors: Any) -> None:  # noqa: ANN401 - any structure of tensors
        """Never count these tensors, such as weights and inputs."""
        for tensor in tree_leaves(tensors):
            if isinstance(tensor, torch.Tensor):
                self._remember(tensor.untyped_storage(), 0)

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:  # noqa: ANN401 - PyTorch's protocol
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self._remember(storage, 0 if self._paused else storage.nbytes())
        return result

    def _remember(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        known = self._known.get(key)
        if known is not None and known() is not None:
            return

        def on_free(_: object) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, on_free)
        self.now += size
        self.peak = max(self.peak, self.now)
