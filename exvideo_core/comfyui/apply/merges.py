"""What merging and saving mean for a model with an extension.

An extension is applied to a base. Merges make that base, whether they come before ExVideo Apply or after it; LoRAs add
to the extension, before or after. The other way round, an extended model cannot be merged into another, nor saved as a
checkpoint: positions and convolutions have no place in either, and half an extension is none.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

#: A weight patch of the host: strength, value, strength of what was there, offset, function.
Entry = tuple[Any, ...]
#: Methods of the host that gather what goes into a checkpoint file.
_SAVING = frozenset({"state_dict_for_saving", "model_state_dict_for_saving"})


def refuse_to_save(name: str) -> None:
    """Called while a state dict is gathered, for whatever purpose.

    The host asks the model itself for what it saves, so that only who is asking tells saving from reading names.

    Raises:
        ValueError: a checkpoint is to be saved.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _SAVING:
            raise ValueError(
                f"This model has the ExVideo extension '{name}' applied, which a checkpoint file cannot hold. Save the "
                "model that goes into ExVideo Apply, and the extension with Save ExVideo Extension."
            )
        frame = frame.f_back


class PatchOrder:
    """Keeps the extension's weight patches where they belong: behind merges, in front of LoRAs.

    A callback of the host for clones: what it puts on a patcher is not cloned with it.

    Args:
        name: the extension's.
        shared: the value of the extension's patch, by weight.
    """

    def __init__(self, name: str, shared: Mapping[str, tuple[torch.Tensor, ...]]) -> None:
        self._name, self._shared = name, shared

    def __call__(self, parent: ModelPatcher, clone: ModelPatcher) -> None:  # noqa: ARG002 - the host's signature
        # Weak: a patcher that holds itself would keep its model until Python looks for cycles.
        patcher = weakref.ref(clone)

        def add_patches(*given: Any, **named: Any) -> list[Any]:  # noqa: ANN401 - the host's
            own = patcher()
            assert own is not None
            added = type(own).add_patches(own, *given, **named)
            for key in added:
                self._sort(own, key if isinstance(key, str) else key[0])
            return added

        def get_key_patches(filter_prefix: str | None = None) -> dict[str, Any]:
            own = patcher()
            assert own is not None
            if filter_prefix is None:  # the host's own bookkeeping
                return type(own).get_key_patches(own)
            raise ValueError(
                f"The model that is merged into another has the ExVideo extension '{self._name}' applied, which a "
                "merge cannot hold. Merge the models that go into ExVideo Apply, and apply the extension to the result."
            )

        clone.add_patches, clone.get_key_patches = add_patches, get_key_patches

    def put_in_place(self, patcher: ModelPatcher) -> None:
        """Put the extension's patches, which are the last ones, behind the last merge that is there."""
        for key in self._shared:
            entries = patcher.patches[key]
            own = entries.pop()
            merges = [at for at, entry in enumerate(entries) if _is_merge(entry)]
            entries.insert(merges[-1] + 1 if merges else 0, own)

    def _sort(self, patcher: ModelPatcher, key: str) -> None:
        """Put a merge that has been added in front of the extension's patch."""
        value, entries = self._shared.get(key), patcher.patches[key]
        if value is not None and _is_merge(entries[-1]):
            place = next(at for at, entry in enumerate(entries) if entry[1] is value)
            entries.insert(place, entries.pop())


def _is_merge(entry: Entry) -> bool:
    """Whether a patch mixes whole weights: another model's list of patches, or less of what was there."""
    return isinstance(entry[1], list) or entry[2] != 1.0
