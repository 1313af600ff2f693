"""Conditions of a part of a clip: of some of its frames, or of a tile of its pictures.

Whatever has a frame or a place follows: conditioning tensors, masks, areas, GLIGEN's boxes, hints of ControlNets.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import comfy.conds
import comfy.utils
import torch

if TYPE_CHECKING:
    from comfy.controlnet import ControlBase

Cond = dict[str, Any]
#: Tensors of a condition that the host repeats where they have fewer rows than there are frames.
_REPEATED = frozenset({"mask", "cross_attn", "c_crossattn", "time_conditioning", "time_context"})
#: What a ControlNet has made of its hint.
_MADE_OF_HINTS = ("cond_hint", "control_input", "extra_concat")


class Controls:
    """ControlNets with the hints of a part, kept for a sampling: they enlarge and encode a hint only once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, Frames | Tile], tuple[ControlBase, ControlBase]] = {}

    def of(self, control: ControlBase, part: Frames | Tile) -> ControlBase:
        """A copy that shares everything with `control` but the hint, which is the part's."""
        key = id(control), part
        if key not in self._made:
            self._made[key] = control, self._cut(control, part)  # with its original, so that no other takes its id
        return self._made[key][1]

    def _cut(self, control: ControlBase, part: Frames | Tile) -> ControlBase:
        own = copy.copy(control)
        _take_methods(own, control)
        for name in _MADE_OF_HINTS:
            if hasattr(own, name):
                setattr(own, name, None)
        part.cut_hint(own)
        if own.previous_controlnet is not None:
            own.previous_controlnet = self.of(own.previous_controlnet, part)
        clones = getattr(own, "multigpu_clones", None)  # 0.3.64 has none
        if clones:
            own.multigpu_clones = {device: self.of(clone, part) for device, clone in clones.items()}
        return own


@dataclass(frozen=True)
class Frames:
    """Some frames of a clip.

    Attributes:
        chosen: their numbers.
        total: frames of the clip.
    """

    chosen: tuple[int, ...]
    total: int

    def rows(self, value: Any, name: str = "") -> Any:  # noqa: ANN401
        """A tensor's rows of these frames, where it has one for each frame, or repeats some."""
        if not torch.is_tensor(value) or value.ndim == 0 or len(value) == 1:
            return value
        if len(value) == self.total:
            return value[list(self.chosen)]
        if name in _REPEATED:
            return value[[frame % len(value) for frame in self.chosen]]
        if name == "concat_latent_image":
            return comfy.utils.resize_to_batch_size(value, self.total)[list(self.chosen)]
        return value

    def cut(self, cond: Cond, controls: Controls) -> Cond:
        """A condition, before or after the host has encoded it."""
        found = {name: self.rows(value, name) for name, value in cond.items()}
        found["model_conds"] = {
            name: comfy.conds.CONDConstant(len(self.chosen))
            if name == "num_video_frames"
            else _with_tensor(value, lambda tensor, name=name: self.rows(tensor, name))
            for name, value in cond.get("model_conds", {}).items()
        }
        if cond.get("control") is not None:
            found["control"] = controls.of(cond["control"], self)
        return found

    def cut_hint(self, control: ControlBase) -> None:
        if hasattr(control, "get_control_inject"):  # ComfyUI-Advanced-ControlNet cuts what it has for frames by itself
            control.get_control = types.MethodType(_get_control_of(self), control)
            return

        def own(hint: Any) -> Any:  # noqa: ANN401
            # As the host spreads hints: one for all, or from the first on again where there are too few.
            if not torch.is_tensor(hint) or len(hint) == 1:
                return hint
            return hint[[frame % len(hint) for frame in self.chosen]]

        control.cond_hint_original = own(control.cond_hint_original)
        control.extra_concat_orig = [own(hint) for hint in control.extra_concat_orig]


@dataclass(frozen=True)
class Tile:
    """A tile of the pictures, in latent pixels.

    Attributes:
        top, left, height, width: of the tile.
        whole: height and width of the picture.
    """

    top: int
    left: int
    height: int
    width: int
    whole: tuple[int, int]

    def of(self, tensor: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """The tile of a tensor [..., H, W] of `scale` times the picture's size."""
        top, left = self.top * scale, self.left * scale
        return tensor[..., top : top + self.height * scale, left : left + self.width * scale]

    def cut(self, cond: Cond, controls: Controls) -> Cond | None:
        """A condition, after the host has encoded it; None where it does not reach into the tile."""

        def own(value: Any) -> Any:  # noqa: ANN401
            fits = torch.is_tensor(value) and value.ndim > 2 and tuple(value.shape[-2:]) == self.whole
            return self.of(value) if fits else value

        found = {name: own(value) for name, value in cond.items()}
        found["model_conds"] = {name: _with_tensor(value, own) for name, value in cond.get("model_conds", {}).items()}
        if cond.get("area") is not None:
            area = self._shared(*_area_of_pictures(cond["area"]))
            if area is None:
                return None
            found["area"] = area
        if cond.get("gligen") is not None:
            kind, model, boxes = cond["gligen"]
            placed = [(box[0], self._shared(*box[1:])) for box in boxes]
            found["gligen"] = kind, model, [(given, *place) for given, place in placed if place is not None]
        if cond.get("control") is not None:
            found["control"] = controls.of(cond["control"], self)
        return found

    def cut_hint(self, control: ControlBase) -> None:
        scale = control.compression_ratio
        vae = getattr(control, "vae", None)
        if vae is not None:
            scale *= vae.spacial_compression_encode()
        method = control.upscale_algorithm

        def own(hint: Any) -> Any:  # noqa: ANN401
            if not torch.is_tensor(hint) or hint.ndim < 4:
                return hint
            height, width = (size * scale for size in self.whole)
            return self.of(comfy.utils.common_upscale(hint, width, height, method, "center"), scale)

        control.cond_hint_original = own(control.cond_hint_original)
        control.extra_concat_orig = [own(hint) for hint in control.extra_concat_orig]
        mask = getattr(control, "mask_cond_hint_original", None)  # of ComfyUI-Advanced-ControlNet
        if mask is not None:
            control.mask_cond_hint_original = own(mask[:, None])[:, 0]

    def _shared(self, height: int, width: int, top: int, left: int) -> tuple[int, int, int, int] | None:
        """The part of a box that lies in the tile, in the tile's own coordinates, as the host orders them."""
        first_row, first_column = max(top, self.top), max(left, self.left)
        rows = min(top + height, self.top + self.height) - first_row
        columns = min(left + width, self.left + self.width) - first_column
        if rows <= 0 or columns <= 0:
            return None
        return rows, columns, first_row - self.top, first_column - self.left


class Caches:
    """EasyCache's state of each part of a clip.

    It holds what the model has made of a condition at the last step, and would take one part's for another's.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[int, Frames | Tile], tuple[Any, Any]] = {}

    def of(self, options: dict[str, Any], part: Frames | Tile, model_sampling: Any) -> dict[str, Any]:  # noqa: ANN401
        """Model options with the state of a part."""
        given = options.get("transformer_options", {})
        cache = given.get("easycache")
        if cache is None or not hasattr(cache, "uuid_cache_diffs"):  # LazyCache sees the whole clip
            return options
        key = id(cache), part
        if key not in self._made:
            self._made[key] = cache, cache.clone().prepare_timesteps(model_sampling)
        return {**options, "transformer_options": {**given, "easycache": self._made[key][1]}}


class Parts:
    """What belongs to the parts of a clip, for as long as a sampling runs."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.controls, self.caches = Controls(), Caches()


def _take_methods(own: ControlBase, control: ControlBase) -> None:
    """Bind to a copy what its original has bound to itself, as ComfyUI-Advanced-ControlNet does with its methods."""
    for name, value in list(vars(own).items()):
        if getattr(value, "__self__", None) is not control:
            continue
        bound = super(value.__thisclass__, own) if isinstance(value, super) else types.MethodType(value.__func__, own)
        setattr(own, name, bound)


def _get_control_of(frames: Frames) -> Callable[..., Any]:
    """The method `get_control` of ComfyUI-Advanced-ControlNet's controls, for a window.

    They are told their frames at every call, by the channel that ComfyUI-AnimateDiff-Evolved uses: the host's `pre_run`
    makes them forget. Where that pack cuts a window further, the frames are those of its part.
    """

    def get_control(
        own: Any,  # noqa: ANN401 - theirs
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Cond,
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        given = transformer_options.get("ad_params") or {}
        if given.get("exvideo") != frames:  # chained controls pass on what the last one was told
            part = given.get("sub_idxs")
            chosen = list(frames.chosen) if part is None else [frames.chosen[index] for index in part]
            place = {"sub_idxs": chosen, "context_length": len(chosen), "full_length": frames.total, "exvideo": frames}
            transformer_options = {**transformer_options, "ad_params": place}
        return type(own).get_control_inject(own, x_noisy, t, cond, batched_number, transformer_options)

    return get_control


def _area_of_pictures(area: Sequence[int]) -> tuple[int, int, int, int]:
    """(height, width, top, left) of the host's area, which may have more dimensions in front."""
    half = len(area) // 2
    height, width = area[half - 2 : half]
    top, left = area[-2:]
    return height, width, top, left


def _with_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:  # noqa: ANN401 - of comfy.conds
    tensor = getattr(value, "cond", None)
    return value._copy_with(change(tensor)) if torch.is_tensor(tensor) else value
