"""Samples an extension that was distilled for few steps as it was made for, and says in the log if a run does not."""

from __future__ import annotations

import logging
import math
from functools import cache
from typing import TYPE_CHECKING, Any

from comfy.model_sampling import ModelSamplingContinuousEDM
from comfy.patcher_extension import WrappersMP

from ...method.extension import FewSteps
from ..wrappers import set_wrapper

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

_KEY = "exvideo_few_steps"
_CLOSE = 0.02  # relative difference of noise levels
_log = logging.getLogger(__name__)


def set_sigma_range(patched: ModelPatcher, sigma_max: float, sigma_min: float) -> None:
    """Set the highest and the lowest noise level of a clone's schedules, as the node *ModelSamplingContinuousEDM* does.

    Args:
        patched: the clone.
        sigma_max: noise level of the first step.
        sigma_min: noise level of the last step.
    """
    own = patched.get_model_object("model_sampling")
    if isinstance(own, ModelSamplingContinuousEDM):
        sampling = _without_buffers(type(own))(patched.model.model_config)
        sampling.set_parameters(sigma_min, sigma_max, own.sigma_data)
        patched.add_object_patch("model_sampling", sampling)


@cache
def _without_buffers(kind: type[ModelSamplingContinuousEDM]) -> type[ModelSamplingContinuousEDM]:
    """A class of noise levels that are plain tensors.

    ComfyUI 0.33 with dynamic VRAM saves a model's buffers by name, and writes them back after it has changed the
    objects that the model consists of: the noise levels of one prompt would become those of the next.
    """

    class WithoutBuffers(kind):
        def set_parameters(self, *parameters: float) -> None:
            for name in ("sigmas", "log_sigmas"):
                self.__dict__.pop(name, None)
            super().set_parameters(*parameters)

        def register_buffer(self, name: str, tensor: torch.Tensor, persistent: bool = True) -> None:  # noqa: ARG002
            self.__dict__.setdefault(name, tensor)

    return WithoutBuffers


def add_settings_check(patched: ModelPatcher, name: str, few_steps: FewSteps) -> None:
    """Add the check to a clone.

    Args:
        name: of the extension.
        few_steps: the settings that it was distilled for.
    """

    def wrapper(executor: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor,  # noqa: ANN401
                *rest: Any, **named: Any) -> torch.Tensor:  # fmt: skip  # noqa: ANN401
        guider: CFGGuider = executor.class_obj
        steps, guidance = len(sigmas) - 1, float(getattr(guider, "cfg", few_steps.guidance))
        if steps > 0:
            first, last = float(sigmas[0]), float(sigmas[-2])
            expected = few_steps.sigma_max, few_steps.sigma_min if few_steps.steps > 1 else few_steps.sigma_max
            close = all(math.isclose(*pair, rel_tol=_CLOSE) for pair in zip((first, last), expected, strict=True))
            if steps != few_steps.steps or guidance != few_steps.guidance or not close:
                _log.warning(
                    "The extension '%s' was distilled for %s. This run has %d steps, CFG %g, sigma %g to %g.",
                    name, few_steps, steps, guidance, first, last,
                )  # fmt: skip
        return executor(noise, latent, sampler, sigmas, *rest, **named)

    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, _KEY, wrapper)
