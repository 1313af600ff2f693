"""Conditions of a part of a video: a window of its frames, or a tile of its images.

Everything that refers to frames or positions is sliced along: conditioning tensors, masks, areas, GLIGEN's boxes and
ControlNets' hints.
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

Condition = dict[str, Any]
#: Tensors of a condition that ComfyUI repeats if they have fewer rows than there are frames.
_REPEATED = frozenset({"mask", "cross_attn", "c_crossattn", "time_conditioning", "time_context"})
#: What a ControlNet caches of its hint.
_CACHED_HINTS = ("cond_hint", "control_input", "extra_concat")


@dataclass(frozen=True)
class Window:
    """Some frames of a video.

    Attributes:
        frames: their indices.
        total: frames of the video.
    """

    frames: tuple[int, ...]
    total: int

    def select(self, value: Any, name: str = "") -> Any:  # noqa: ANN401
        """The rows of a tensor [T, ...] for these frames, if it has one row per frame or repeats its rows."""
        if not torch.is_tensor(value) or value.ndim == 0 or len(value) == 1:
            return value
        if len(value) == self.total:
            return value[list(self.frames)]
        if name in _REPEATED:
            return value[[frame % len(value) for frame in self.frames]]
        if name == "concat_latent_image":
            return comfy.utils.resize_to_batch_size(value, self.total)[list(self.frames)]
        return value

    def slice_condition(self, condition: Condition, controls: SlicedControls) -> Condition:
        """A condition of these frames, before or after ComfyUI has encoded it."""
        found = {name: self.select(value, name) for name, value in condition.items()}
        found["model_conds"] = {
            name: comfy.conds.CONDConstant(len(self.frames))
            if name == "num_video_frames"
            else _map_tensor(value, lambda tensor, name=name: self.select(tensor, name))
            for name, value in condition.get("model_conds", {}).items()
        }
        if condition.get("control") is not None:
            found["control"] = controls.get(condition["control"], self)
        return found

    def slice_hint(self, control: ControlBase) -> None:
        """Slice the hint of a copy of a ControlNet, in place."""
        if hasattr(control, "get_control_inject"):  # ComfyUI-Advanced-ControlNet slices its hints itself
            control.get_control = types.MethodType(_get_control_for(self), control)
            return

        def select(hint: Any) -> Any:  # noqa: ANN401
            # As ComfyUI distributes hints: one for all frames, or again from the first if there are too few.
            if not torch.is_tensor(hint) or len(hint) == 1:
                return hint
            return hint[[frame % len(hint) for frame in self.frames]]

        control.cond_hint_original = select(control.cond_hint_original)
        control.extra_concat_orig = [select(hint) for hint in control.extra_concat_orig]


@dataclass(frozen=True)
class Tile:
    """A tile of the images, in latent pixels.

    Attributes:
        top, left, height, width: position and size of the tile.
        image_size: height and width of the image.
    """

    top: int
    left: int
    height: int
    width: int
    image_size: tuple[int, int]

    def crop(self, tensor: torch.Tensor, scale: int = 1) -> torch.Tensor:
        """The tile's view of a tensor [..., H, W], of `scale` times the image's size."""
        top, left = self.top * scale, self.left * scale
        return tensor[..., top : top + self.height * scale, left : left + self.width * scale]

    def slice_condition(self, condition: Condition, controls: SlicedControls) -> Condition | None:
        """A condition of the tile, after ComfyUI has encoded it; None if its area lies outside of the tile."""

        def crop(value: Any) -> Any:  # noqa: ANN401
            fits = torch.is_tensor(value) and value.ndim > 2 and tuple(value.shape[-2:]) == self.image_size
            return self.crop(value) if fits else value

        found = {name: crop(value) for name, value in condition.items()}
        found["model_conds"] = {
            name: _map_tensor(value, crop) for name, value in condition.get("model_conds", {}).items()
        }
        if condition.get("area") is not None:
            area = self._intersect(*_image_area(condition["area"]))
            if area is None:
                return None
            found["area"] = area
        if condition.get("gligen") is not None:
            kind, model, boxes = condition["gligen"]
            cropped = [(box[0], self._intersect(*box[1:])) for box in boxes]
            found["gligen"] = kind, model, [(embedding, *area) for embedding, area in cropped if area is not None]
        if condition.get("control") is not None:
            found["control"] = controls.get(condition["control"], self)
        return found

    def slice_hint(self, control: ControlBase) -> None:
        """Crop the hint of a copy of a ControlNet, in place."""
        scale = control.compression_ratio
        vae = getattr(control, "vae", None)
        if vae is not None:
            scale *= vae.spacial_compression_encode()
        method = control.upscale_algorithm

        def crop(hint: Any) -> Any:  # noqa: ANN401
            if not torch.is_tensor(hint) or hint.ndim < 4:
                return hint
            height, width = (size * scale for size in self.image_size)
            return self.crop(comfy.utils.common_upscale(hint, width, height, method, "center"), scale)

        control.cond_hint_original = crop(control.cond_hint_original)
        control.extra_concat_orig = [crop(hint) for hint in control.extra_concat_orig]
        mask = getattr(control, "mask_cond_hint_original", None)  # of ComfyUI-Advanced-ControlNet
        if mask is not None:
            control.mask_cond_hint_original = crop(mask[:, None])[:, 0]

    def _intersect(self, height: int, width: int, top: int, left: int) -> tuple[int, int, int, int] | None:
        """The part of a box inside the tile, in the tile's coordinates and ComfyUI's order; None if there is none."""
        first_row, first_column = max(top, self.top), max(left, self.left)
        rows = min(top + height, self.top + self.height) - first_row
        columns = min(left + width, self.left + self.width) - first_column
        if rows <= 0 or columns <= 0:
            return None
        return rows, columns, first_row - self.top, first_column - self.left


Part = Window | Tile


class SamplingState:
    """What the parts of a video keep while a sampling runs: sliced ControlNets, and EasyCache's state."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.controls, self.easy_caches = SlicedControls(), EasyCaches()


class SlicedControls:
    """ControlNets with a part's hint. They are kept for a sampling, because they upscale and encode a hint once."""

    def __init__(self) -> None:
        self._sliced: dict[tuple[int, Part], tuple[ControlBase, ControlBase]] = {}

    def get(self, control: ControlBase, part: Part) -> ControlBase:
        """A copy that shares everything with `control` except the hint, which is the part's."""
        key = id(control), part
        if key not in self._sliced:
            self._sliced[key] = control, self._slice(control, part)  # keeps the original, so that its id stays taken
        return self._sliced[key][1]

    def _slice(self, control: ControlBase, part: Part) -> ControlBase:
        own = copy.copy(control)
        _rebind_methods(own, control)
        for name in _CACHED_HINTS:
            if hasattr(own, name):
                setattr(own, name, None)
        part.slice_hint(own)
        if own.previous_controlnet is not None:
            own.previous_controlnet = self.get(own.previous_controlnet, part)
        clones = getattr(own, "multigpu_clones", None)  # 0.3.64 has none
        if clones:
            own.multigpu_clones = {device: self.get(clone, part) for device, clone in clones.items()}
        return own


class EasyCaches:
    """EasyCache's state for each part of a video.

    EasyCache keeps the model's output for a condition at the last step, and would mix up the outputs of the parts.
    """

    def __init__(self) -> None:
        self._states: dict[tuple[int, Part], tuple[Any, Any]] = {}

    def options(self, options: dict[str, Any], part: Part, model_sampling: Any) -> dict[str, Any]:  # noqa: ANN401
        """Model options with the state of a part."""
        transformer_options = options.get("transformer_options", {})
        cache = transformer_options.get("easycache")
        if cache is None or not hasattr(cache, "uuid_cache_diffs"):  # LazyCache sees the whole video
            return options
        key = id(cache), part
        if key not in self._states:
            self._states[key] = cache, cache.clone().prepare_timesteps(model_sampling)
        own_options = {**transformer_options, "easycache": self._states[key][1]}
        return {**options, "transformer_options": own_options}


def _rebind_methods(own: ControlBase, control: ControlBase) -> None:
    """Bind to a copy what its original has bound to itself, as ComfyUI-Advanced-ControlNet does with its methods."""
    for name, value in list(vars(own).items()):
        if getattr(value, "__self__", None) is not control:
            continue
        bound = super(value.__thisclass__, own) if isinstance(value, super) else types.MethodType(value.__func__, own)
        setattr(own, name, bound)


def _get_control_for(window: Window) -> Callable[..., Any]:
    """The method `get_control` of ComfyUI-Advanced-ControlNet's controls, for a window.

    It passes the window's frames at every call, the way ComfyUI-AnimateDiff-Evolved does, because ComfyUI's `pre_run`
    makes controls forget them. If that pack splits a window further, the frames are those of its part.
    """

    def get_control(
        own: Any,  # noqa: ANN401 - theirs
        x_noisy: torch.Tensor,
        t: torch.Tensor,
        cond: Condition,
        batched_number: int,
        transformer_options: dict[str, Any],
    ) -> Any:  # noqa: ANN401
        previous = transformer_options.get("ad_params") or {}
        if previous.get("exvideo") != window:  # chained controls pass on the options of the previous one
            part = previous.get("sub_idxs")
            frames = list(window.frames) if part is None else [window.frames[index] for index in part]
            params = {
                "sub_idxs": frames, "context_length": len(frames), "full_length": window.total, "exvideo": window,
            }  # fmt: skip
            transformer_options = {**transformer_options, "ad_params": params}
        return type(own).get_control_inject(own, x_noisy, t, cond, batched_number, transformer_options)

    return get_control


def _image_area(area: Sequence[int]) -> tuple[int, int, int, int]:
    """(height, width, top, left) of ComfyUI's area, which may have more dimensions in front."""
    half = len(area) // 2
    height, width = area[half - 2 : half]
    top, left = area[-2:]
    return height, width, top, left


def _map_tensor(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:  # noqa: ANN401 - of comfy.conds
    tensor = getattr(value, "cond", None)
    return value._copy_with(change(tensor)) if torch.is_tensor(tensor) else value
