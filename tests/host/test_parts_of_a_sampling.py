"""Windows, tiles and schedules in parts: each part gets what is its own, and begins as a sampling of its own does."""

from __future__ import annotations

from typing import Any

import comfy.controlnet
import comfy.model_patcher
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import svd
from composition import CASES, hook_lora, lora, noise_of, sample
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.sampling.tiles import TileSettings, with_tiles
from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
from exvideo_core.method.extension import Extension
from exvideo_core.video.windows import continuation_mask, split_windows

FRAMES, WINDOW, OVERLAP = 10, 6, 2
SEQUENTIAL, FLAT = WindowSettings(WINDOW, OVERLAP, "sequential"), WindowSettings(WINDOW, OVERLAP, "flat")
#: How far two ways to the same clip may be apart, from rounding alone.
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def model(small_models):
    return apply_extension(load_checkpoint(str(small_models[0]))[0], Extension.load(small_models[1]))


def case(name: str) -> Any:
    return next(each for each in CASES if each.name == name)


def calls_of(model, **sampling: Any) -> tuple[torch.Tensor, list[dict[str, Any]]]:
    """A clip, and what each call of the UNet was given."""
    seen: list[dict[str, Any]] = []

    def see(executor, x, timesteps, context, y, control, options, **rest):
        weight = model.model.diffusion_model.input_blocks[1][1].time_stack[0].attn1.to_v.weight
        hint = None if control is None else control["output"][0].clone()
        seen.append({"x": x.clone(), "hint": hint, "weight": weight.detach().clone()})
        return executor(x, timesteps, context, y, control, options, **rest)

    watched = model.clone()
    watched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", see)
    return sample(watched, **sampling), seen


class Hints(torch.nn.Module):
    """A ControlNet that hands its hint on: what the UNet gets tells which frames and which place it was made for."""

    dtype = torch.float32

    def forward(self, x, hint, timesteps, context, **rest):  # noqa: ANN001, ANN202, ARG002
        # The host takes them from the last, which is the deepest level's; the first is for the UNet's last block.
        return {"input": [], "middle": [], "output": [_hints_as_maps(hint, x.shape[0]), *[None] * 11]}


def _hints_as_maps(hint: torch.Tensor, count: int) -> torch.Tensor:
    """Hints [1 or N, 3, 8 H, 8 W], N a frame count, for all conditions -> [count, 32, H, W]."""
    hint = hint if len(hint) == 1 else hint.repeat(count // len(hint), 1, 1, 1)
    return torch.nn.functional.avg_pool2d(hint[:, :1], 8).expand(count, 32, -1, -1).clone()


def control_of(hint: torch.Tensor, previous: Any = None) -> Any:
    control = comfy.controlnet.ControlNet(None, load_device=torch.device("cpu"))
    control.control_model = Hints()
    control.control_model_wrapped = comfy.model_patcher.ModelPatcher(
        control.control_model, load_device=torch.device("cpu"), offload_device=torch.device("cpu")
    )
    control.set_cond_hint(hint, 1.0, (0.0, 1.0))
    control.set_previous_controlnet(previous)
    return control


def controlled(control: Any):
    def conds(positive: list, negative: list) -> tuple[list, list]:
        return [[positive[0][0], {**positive[0][1], "control": control, "control_apply_to_uncond": True}]], negative

    return conds


def frame_hints(count: int, size: int = 8) -> torch.Tensor:
    """Each frame's hint is its number."""
    return torch.arange(1.0, count + 1).view(-1, 1, 1, 1).expand(-1, 3, 8 * size, 8 * size).clone()


@pytest.mark.parametrize("settings", [SEQUENTIAL, FLAT], ids=["sequential", "flat"])
@pytest.mark.parametrize("count", [1, 4, FRAMES, FRAMES + 3])
def test_each_window_sees_its_own_hints(model, settings, count: int) -> None:
    """As many as the host would see without windows: one for all, or from the first on again."""
    control = control_of(frame_hints(count))
    sampling = {"noise": noise_of(FRAMES), "conds": controlled(control), "steps": 2}
    _, calls = calls_of(with_windows(model, settings), **sampling)
    whole = calls_of(model, **sampling)[1][0]["hint"][:FRAMES, 0, 0, 0]
    windows = [tuple(window) for window in split_windows(FRAMES, WINDOW, OVERLAP)]
    found = [tuple(call["hint"][:WINDOW, 0, 0, 0].tolist()) for call in calls]
    assert set(found) == {tuple(whole[list(window)].tolist()) for window in windows}
    assert control.cond_hint is None and len(control.cond_hint_original) == count


def test_chained_controls_follow_too(model) -> None:
    control = control_of(frame_hints(FRAMES), previous=control_of(100 * frame_hints(FRAMES)))
    _, calls = calls_of(with_windows(model, FLAT), noise=noise_of(FRAMES), conds=controlled(control))
    found = {call["hint"][0, 0, 0, 0].item() for call in calls}
    assert found == {101.0 * (window[0] + 1) for window in split_windows(FRAMES, WINDOW, OVERLAP)}


class BoundControl(comfy.controlnet.ControlNet):
    """As those of ComfyUI-Advanced-ControlNet: methods bound to the object, and frames from the transformer options."""

    def __init__(self) -> None:
        super().__init__(None, load_device=torch.device("cpu"))
        self.base = super()
        self.get_control, self.pre_run = self.get_control_inject, self.pre_run_inject
        self.sub_idxs = None

    def pre_run_inject(self, model, percent_to_timestep_function):
        self.base.pre_run(model, percent_to_timestep_function)
        self.sub_idxs = None

    def get_control_inject(self, x_noisy, t, cond, batched_number, transformer_options):
        if "ad_params" in transformer_options:
            self.sub_idxs = transformer_options["ad_params"]["sub_idxs"]
            assert transformer_options["ad_params"]["full_length"] == FRAMES
        hint = self.cond_hint_original if self.sub_idxs is None else self.cond_hint_original[self.sub_idxs]
        return {"input": [], "middle": [], "output": [_hints_as_maps(hint, len(x_noisy)), *[None] * 11]}

    def get_models(self):
        return []


@pytest.mark.parametrize("settings", [SEQUENTIAL, FLAT], ids=["sequential", "flat"])
def test_controls_that_know_of_frames_are_told_theirs(model, settings) -> None:
    control = BoundControl().set_cond_hint(frame_hints(FRAMES))
    _, calls = calls_of(with_windows(model, settings), noise=noise_of(FRAMES), conds=controlled(control))
    found = {tuple(call["hint"][:WINDOW, 0, 0, 0].tolist()) for call in calls}
    assert found == {tuple(frame + 1.0 for frame in window) for window in split_windows(FRAMES, WINDOW, OVERLAP)}
    assert control.sub_idxs is None and control.get_control.__self__ is control


def test_each_tile_sees_its_own_hints(model) -> None:
    hint = torch.rand(1, 3, 8 * 12, 8 * 16, generator=torch.Generator().manual_seed(3))
    noise = torch.randn(3, 4, 12, 16, generator=torch.Generator().manual_seed(7))
    _, calls = calls_of(
        with_tiles(model, TileSettings(10, 8, 4)), noise=noise, conds=controlled(control_of(hint)), steps=1
    )
    whole = torch.nn.functional.avg_pool2d(hint[:, :1], 8)[0, 0]
    found = [call["hint"][0, 0] for call in calls]
    expected = [
        whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        for rows in split_windows(12, 8, 4)
        for columns in split_windows(16, 10, 4)
    ]
    for tile in expected:
        assert any(torch.allclose(tile, each) for each in found)
    assert all(any(torch.allclose(tile, each) for tile in expected) for each in found)


@pytest.mark.parametrize("settings", [SEQUENTIAL, FLAT], ids=["sequential", "flat"])
def test_each_window_sees_its_own_masks(model, settings) -> None:
    """A condition that is masked out of all frames but the last window's own changes those alone."""
    mask = torch.zeros(FRAMES, 8, 8)
    mask[WINDOW:] = 1

    def masked(positive: list, negative: list) -> tuple[list, list]:
        other = [positive[0][0].flip(-1), {**positive[0][1], "mask": mask, "mask_strength": 1.0}]
        return [*positive, other], negative

    windowed = with_windows(model, WindowSettings(WINDOW, OVERLAP, settings.fuse, "first picture"))
    plain, found = (sample(windowed, noise=noise_of(FRAMES), conds=conds) for conds in (None, masked))
    first = range(WINDOW - OVERLAP)
    assert svd.relative_error(found[first], plain[first]) < ROUNDING
    assert svd.relative_error(found[WINDOW:], plain[WINDOW:]) > 0.05


def test_areas_and_boxes_are_those_of_the_tile(model) -> None:
    """An area that fills the right half leaves a tile on the left as it was, and fills one on the right."""
    noise = torch.randn(3, 4, 8, 16, generator=torch.Generator().manual_seed(7))

    def right(positive: list, negative: list) -> tuple[list, list]:
        return [*positive, [positive[0][0].flip(-1), {**positive[0][1], "area": (8, 8, 0, 8)}]], negative

    def everywhere(positive: list, negative: list) -> tuple[list, list]:
        return [*positive, [positive[0][0].flip(-1), positive[0][1]]], negative

    tiled = with_tiles(model, TileSettings(8, 8, 0))
    plain, found, both = (sample(tiled, noise=noise, steps=1, conds=conds) for conds in (None, right, everywhere))
    assert svd.relative_error(found[..., :8], plain[..., :8]) < ROUNDING
    assert svd.relative_error(found[..., 8:], plain[..., 8:]) > 0.05
    assert svd.relative_error(found[..., 8:], both[..., 8:]) < ROUNDING


def sequential_by_hand(change, model, **sampling: Any) -> torch.Tensor:
    """Each of the sequential windows as a sampling of its own, by the host's own inpainting.

    Args:
        change: what other nodes do to the model, anew for each window.
    """
    noise, clip = noise_of(FRAMES), torch.zeros(FRAMES, 4, 8, 8)
    windows = split_windows(FRAMES, WINDOW, OVERLAP)
    for number, frames in enumerate(windows):
        picture = clip[frames[:1]].clone() if number else None

        def begun(positive: list, negative: list, start: torch.Tensor | None = picture) -> tuple[list, list]:
            if start is None:
                return positive, negative
            return [[positive[0][0], {**positive[0][1], "concat_latent_image": start}]], negative

        mask = continuation_mask(windows, number).view(-1, 1, 1, 1).expand(-1, 1, 8, 8) if number else None
        clip[frames] = sample(change(model), noise=noise[frames], latent=clip[frames], noise_mask=mask, conds=begun,
                              seed=1 + number, **sampling)  # fmt: skip
    return clip


@pytest.mark.parametrize("name", ["EasyCache", "LazyCache"])
def test_caches_begin_anew_in_each_window(model, name: str) -> None:
    cached = case(name).apply
    clip = sample(cached(with_windows(model, SEQUENTIAL)), noise=noise_of(FRAMES), steps=8)
    assert svd.relative_error(clip, sequential_by_hand(cached, model, steps=8)) < ROUNDING
    uncached = sample(with_windows(model, SEQUENTIAL), noise=noise_of(FRAMES), steps=8)
    assert svd.relative_error(clip, uncached) > 100 * ROUNDING, "nothing was cached"


def test_easycache_keeps_averaged_windows_and_tiles_apart(model) -> None:
    """A state that windows share would put one's result in the place of the other's."""
    cached = case("EasyCache").apply
    alone = svd.relative_error(sample(cached(model), noise=noise_of(WINDOW), steps=8),
                               sample(model, noise=noise_of(WINDOW), steps=8))  # fmt: skip
    for cut, noise in (
        (lambda each: with_windows(each, FLAT), noise_of(FRAMES)),
        (lambda each: with_tiles(each, TileSettings(8, 8, 2)), noise_of(3, 12)),
    ):
        found = svd.relative_error(*(sample(each, noise=noise, steps=8) for each in (cached(cut(model)), cut(model))))
        assert 0 < found < 5 * max(alone, 0.01)


def test_lora_schedules_begin_anew_in_each_window(model) -> None:
    """From 1 to 0 in every window, as the weights of each call show."""
    layers = lora(model, ("input_blocks.1.1.time_stack.0.attn1.to_v",))
    sampling = {"steps": 4, "conds": hook_lora(layers), "cfg": 1.0}
    _, calls = calls_of(with_windows(model, SEQUENTIAL), noise=noise_of(FRAMES), **sampling)
    _, alone = calls_of(model, noise=noise_of(WINDOW), **sampling)
    first, last = alone[0]["weight"], alone[-1]["weight"]
    assert not first.equal(last)
    schedule = [call["weight"].equal(first) for call in alone]
    assert [call["weight"].equal(first) for call in calls] == schedule * len(split_windows(FRAMES, WINDOW, OVERLAP))


def test_guidance_sees_the_noise_level_of_its_window(model) -> None:
    """In place of the whole clip's, whatever frame it looks at: one without noise would end a schedule."""
    levels = []

    def guide(args):
        assert len(args["cond"]) == len(args["sigma"]) == FRAMES
        levels.append(args["sigma"].unique().tolist())
        return args["uncond"] + 3 * (args["cond"] - args["uncond"])

    guided = with_windows(model, SEQUENTIAL)
    guided.set_model_sampler_cfg_function(guide)
    sample(guided, noise=noise_of(FRAMES), steps=3)
    count = len(split_windows(FRAMES, WINDOW, OVERLAP))
    assert len(levels) == 3 * count and all(len(level) == 1 and level[0] > 0 for level in levels)
    assert levels == levels[:3] * count


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m", "uni_pc"])
def test_samplers_with_memory_begin_anew_in_each_window(model, sampler: str) -> None:
    clip = sample(with_windows(model, SEQUENTIAL), noise=noise_of(FRAMES), steps=4, sampler=sampler)
    expected = sequential_by_hand(lambda each: each, model, steps=4, sampler=sampler)
    assert svd.relative_error(clip, expected) < ROUNDING


def in_two(first, second, steps: int = 4, at: int = 2) -> torch.Tensor:
    """A schedule split between two models, the second going on from the noise that the first has left."""
    noise = noise_of(FRAMES)
    left = sample(first, noise=noise, steps=steps, last_step=at, force_full_denoise=False)
    return sample(second, noise=torch.zeros_like(noise), latent=left, steps=steps, start_step=at,
                  disable_noise=True)  # fmt: skip


def test_averaged_windows_may_be_split_between_samplers(model) -> None:
    whole = sample(with_windows(model, FLAT), noise=noise_of(FRAMES), steps=4)
    assert svd.relative_error(in_two(*[with_windows(model, FLAT)] * 2), whole) < ROUNDING


def test_sequential_windows_cannot_leave_noise(model) -> None:
    before = sample(model)
    with pytest.raises(ValueError, match="(?s)finishes one window.*end_at_step.*pyramid"):
        in_two(with_windows(model, SEQUENTIAL), model)
    assert sample(model).equal(before)


def test_sequential_windows_go_on_from_what_another_sampler_has_left(model) -> None:
    """Every window begins at the noise that was left, overlaps included, and one window is the plain sampler's."""
    seen = []
    windowed = with_windows(model, SEQUENTIAL)

    def see(executor, x, *rest, **named):
        seen.append(x.clone())
        return executor(x, *rest, **named)

    windowed.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, "test", see)
    left = sample(with_windows(model, FLAT), noise=noise_of(FRAMES), steps=4, last_step=2, force_full_denoise=False)
    clip = sample(windowed, noise=torch.zeros_like(left), latent=left, steps=4, start_step=2, disable_noise=True)
    begun = seen[:: len(seen) // len(split_windows(FRAMES, WINDOW, OVERLAP))]
    scaled = model.model.process_latent_in(left)
    for x, frames in zip(begun, split_windows(FRAMES, WINDOW, OVERLAP), strict=True):
        assert svd.relative_error(x, scaled[frames]) < ROUNDING
    alone = sample(model, noise=torch.zeros(WINDOW, 4, 8, 8), latent=left[:WINDOW], steps=4, start_step=2,
                   disable_noise=True)  # fmt: skip
    own = slice(WINDOW - OVERLAP)
    assert svd.relative_error(clip[own], alone[own]) < ROUNDING


def test_a_second_pass_begins_at_its_own_noise(model) -> None:
    """Partly denoised, with new noise."""
    given = torch.randn(FRAMES, 4, 8, 8, generator=torch.Generator().manual_seed(4))
    clip = sample(with_windows(model, SEQUENTIAL), noise=noise_of(FRAMES), latent=given, denoise=0.3, steps=4)
    own = slice(WINDOW - OVERLAP)
    alone = sample(model, noise=noise_of(FRAMES)[:WINDOW], latent=given[:WINDOW], denoise=0.3, steps=4)
    assert svd.relative_error(clip[own], alone[own]) < ROUNDING


def test_what_is_not_computed_in_chunks_is_logged_once_a_sampling(model, caplog) -> None:
    """Not for every window, though each is a sampling of its own for the host."""
    caplog.set_level("INFO")
    patched = with_windows(case("a patch that looks across frames").apply(model), SEQUENTIAL)
    for times in (1, 2):
        sample(patched, noise=noise_of(FRAMES), steps=1)
        assert len([line for line in caplog.messages if "whole transformer blocks" in line]) == times
