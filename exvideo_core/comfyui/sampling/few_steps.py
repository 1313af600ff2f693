"""Says in the log if an extension that was distilled for few steps is sampled with other settings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from comfy.patcher_extension import WrappersMP

from ...method.extension import FewSteps
from ..wrappers import set_wrapper

if TYPE_CHECKING:
    import torch
    from comfy.model_patcher import ModelPatcher
    from comfy.samplers import CFGGuider

_KEY = "exvideo_few_steps"
_log = logging.getLogger(__name__)


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
        if steps != few_steps.steps or guidance != few_steps.guidance:
            _log.warning(
                "The extension '%s' was distilled for %s. This run has %d steps and CFG %g.",
                name, few_steps, steps, guidance,
            )  # fmt: skip
        return executor(noise, latent, sampler, sigmas, *rest, **named)

    set_wrapper(patched, WrappersMP.OUTER_SAMPLE, _KEY, wrapper)
