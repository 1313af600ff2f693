"""Merging and saving a model with an extension.

Merges change the base model and LoRAs add to the extension, whether they come before or after ExVideo Apply. An
extended model can neither be merged into another model nor be saved as a checkpoint: both would lose positions and
convolutions, and the rest of an extension is useless without them.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

#: ComfyUI's weight patch: strength of the patch, value, strength of the weight, offset, function.
Entry = tuple[Any, ...]
#: ComfyUI's methods that collect tensors for a checkpoint file.
_SAVING = frozenset({"state_dict_for_saving", "model_state_dict_for_saving"})


def refuse_to_save(name: str) -> None:
    """Refuse to build a state dict for a checkpoint file.

    ComfyUI also calls `state_dict` to list names, so that only the call stack shows whether it is saving.

    Args:
        name: name of the applied extension.

    Raises:
        ValueError: the state dict is for a checkpoint file.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in _SAVING:
            raise ValueError(
                f"This model has the ExVideo extension '{name}' applied, which a checkpoint file cannot store. Save "
                "the model that goes into ExVideo Apply, and save the extension with Save ExVideo Extension."
            )
        frame = frame.f_back


class PatchOrder:
    """Keeps the extension's weight patches after merges and before LoRAs.

    An ON_CLONE callback, because the methods that it sets on a patcher are not cloned.

    Args:
        name: name of the extension.
        shared: value of the extension's patch for each weight.
    """

    def __init__(self, name: str, shared: Mapping[str, tuple[torch.Tensor, ...]]) -> None:
        self._name, self._shared = name, shared

    def __call__(self, parent: ModelPatcher, clone: ModelPatcher) -> None:  # noqa: ARG002 - ComfyUI's signature
        # A weak reference, since a cycle would keep the model alive until Python's next garbage collection.
        patcher = weakref.ref(clone)

        def add_patches(*args: Any, **kwargs: Any) -> list[Any]:  # noqa: ANN401 - ComfyUI's
            own = patcher()
            assert own is not None
            added = type(own).add_patches(own, *args, **kwargs)
            for key in added:
                self._sort(own, key if isinstance(key, str) else key[0])
            return added

        def get_key_patches(filter_prefix: str | None = None) -> dict[str, Any]:
            own = patcher()
            assert own is not None
            if filter_prefix is None:  # ComfyUI's own bookkeeping
                return type(own).get_key_patches(own)
            raise ValueError(
                f"The second model of this merge has the ExVideo extension '{self._name}' applied, which cannot be "
                "merged. Merge the models before ExVideo Apply and apply the extension to the result."
            )

        clone.add_patches, clone.get_key_patches = add_patches, get_key_patches

    def put_in_place(self, patcher: ModelPatcher) -> None:
        """Move the extension's patches from the end of each list to after the last merge."""
        for key in self._shared:
            entries = patcher.patches[key]
            own = entries.pop()
            merges = [at for at, entry in enumerate(entries) if _is_merge(entry)]
            entries.insert(merges[-1] + 1 if merges else 0, own)

    def _sort(self, patcher: ModelPatcher, key: str) -> None:
        """Move a merge that was just added to before the extension's patch."""
        value, entries = self._shared.get(key), patcher.patches[key]
        if value is not None and _is_merge(entries[-1]):
            index = next(at for at, entry in enumerate(entries) if entry[1] is value)
            entries.insert(index, entries.pop())


def _is_merge(entry: Entry) -> bool:
    """Whether a patch is a merge: another model's list of patches, or one that scales down the weight itself."""
    return isinstance(entry[1], list) or entry[2] != 1.0
