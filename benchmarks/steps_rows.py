"""The rows of `bench steps`: models, samplers, schedules, guidance and caches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from small_model import recipe

Kind = Literal["exact", "fast", "undistilled", "few-step"]


@dataclass(frozen=True)
class Row:
    """A way to sample.

    Attributes:
        name: in the table.
        kind: `exact` is the reference's 50 steps, `undistilled` fewer plain steps, `fast` another sampler, schedule,
            guidance or cache, `few-step` a distilled extension.
        steps: denoising steps.
        sampler: ComfyUI's name.
        scheduler: ComfyUI's name, or "ays" for Align Your Steps.
        guidance: classifier-free guidance scale.
        interval: noise levels (low, high) outside of which there is no guidance.
        sigmas: highest and lowest noise level, other than the model's own.
        cache: ComfyUI's node "EasyCache" or "LazyCache" with a threshold.
    """

    name: str
    kind: Kind
    steps: int
    sampler: str = "euler"
    scheduler: str = "karras"
    guidance: float = recipe.GUIDANCE
    interval: tuple[float, float] | None = None
    sigmas: tuple[float, float] | None = None
    cache: tuple[str, float] | None = None


def rows() -> list[Row]:
    """All rows."""
    found = [Row("euler, 50 steps", "exact", 50)]
    found += [Row(f"euler, {steps} steps", "undistilled", steps) for steps in (25, 15, 8, 4, 2, 1)]
    for sampler in ("dpmpp_2m", "uni_pc", "res_multistep", "heun", "dpmpp_2m_sde", "lcm"):
        found += [Row(f"{sampler}, {steps} steps", "fast", steps, sampler) for steps in (15, 8, 4)]
    for scheduler in ("ays", "exponential", "beta", "sgm_uniform"):
        found += [Row(f"euler, {scheduler}, {n} steps", "fast", n, scheduler=scheduler) for n in (15, 8, 4)]
    found += [Row(f"euler, {steps} steps, no guidance", "fast", steps, guidance=1.0) for steps in (25, 16, 8, 4, 1)]
    found.append(Row("lcm, 25 steps, no guidance", "fast", 25, "lcm", guidance=1.0))
    # Align Your Steps was found for 10 steps.
    found.append(Row("euler, ays, 10 steps", "fast", 10, scheduler="ays"))
    found.append(Row("euler, ays, 10 steps, no guidance", "fast", 10, scheduler="ays", guidance=1.0))
    ranges = (("euler", 8, 200.0, 1.0), ("lcm", 8, 700.0, 1.0), ("euler", 4, 45.0, 2.5), ("euler", 2, 45.0, 6.0))
    for sampler, n, high, low in ranges:
        name = f"{sampler}, {n} steps, no guidance, sigma {high:g} to {low:g}"
        found.append(Row(name, "fast", n, sampler, guidance=1.0, sigmas=(high, low)))
    found.append(Row("euler, 25 steps, guidance below 10", "fast", 25, interval=(0.0, 10.0)))
    for node in ("EasyCache", "LazyCache"):
        found += [Row(f"euler, 25 steps, {node} {t}", "fast", 25, cache=(node, t)) for t in (0.05, 0.1, 0.2)]
    return found


def few_step_rows(name: str) -> list[Row]:
    """The rows of a distilled model, which brings its own noise levels."""
    return [Row(f"{name}, {n} steps", "few-step", n, guidance=1.0) for n in (8, 4, 2, 1)]
