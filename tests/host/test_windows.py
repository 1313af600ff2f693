"""Windows and tiles against the host's own sampler, run by hand on each window."""

from __future__ import annotations

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import svd
from exvideo_core.choices import ANCHORS, FUSES
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.sampling.tiles import TileSettings, with_tiles
from exvideo_core.comfyui.sampling.windows import WindowSettings, with_windows
from exvideo_core.video.windows import continuation_mask, fuse_weights, split_windows

FRAMES, SIZE = 13, 8
WINDOW, OVERLAP = 6, 2
#: So few Euler steps take noise of 700 times the result's size away at once, and some digits with it.
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def pair() -> svd.Pair:
    return svd.make_pair()


@pytest.fixture(scope="module")
def model(pair):
    return apply_extension(pair.base, pair.extension)


def conditioning(
    size: int = SIZE, picture: torch.Tensor | None = None, embedding: torch.Tensor | None = None
) -> tuple[list, list]:
    generator = torch.Generator().manual_seed(5)
    own = torch.randn(1, 1, svd.CONTEXT, generator=generator)
    embedding = own if embedding is None else embedding
    given = torch.randn(1, 4, size, size, generator=generator) if picture is None else picture
    micro = {"motion_bucket_id": 127, "fps": 30, "augmentation_level": 0.02}
    negative = {**micro, "concat_latent_image": torch.zeros_like(given)}
    return [[embedding, {**micro, "concat_latent_image": given}]], [[torch.zeros_like(embedding), negative]]


def test_anchors_differ(model) -> None:
    """By far more than any rounding that the tests below allow."""
    for fuse in ("sequential", "flat"):
        first, second, third = (
            sample(with_windows(model, WindowSettings(6, 2, fuse, anchor)), noise()) for anchor in ANCHORS
        )
        assert min(svd.relative_error(first, second), svd.relative_error(second, third)) > 0.05


def noise(frames: int = FRAMES, size: int = SIZE) -> torch.Tensor:
    return torch.randn(frames, 4, size, size, generator=torch.Generator().manual_seed(7))


def sample(
    model,
    noise,
    *,
    steps=2,
    cfg=1.0,
    picture=None,
    embedding=None,
    negative_only=False,
    latent=None,
    mask=None,
    **named,
):
    """The host's sampler, as its KSampler node calls it."""
    positive, negative = conditioning(noise.shape[-1], picture, embedding)
    latent = torch.zeros_like(noise) if latent is None else latent
    conds = (negative, negative) if negative_only else (positive, negative)
    return comfy.sample.sample(
        model, noise, steps, cfg, "euler", "karras", *conds, latent, noise_mask=mask, seed=1, disable_pbar=True, **named
    )


def guided(model, min_cfg: float):
    from comfy_extras.nodes_video_model import VideoLinearCFGGuidance

    return VideoLinearCFGGuidance().patch(model, min_cfg)[0]


@pytest.mark.parametrize("fuse", FUSES)
def test_a_clip_that_fits_is_sampled_as_without(model, fuse) -> None:
    plain = sample(model, noise())
    for frames in (FRAMES, FRAMES + 5):
        found = sample(with_windows(model, WindowSettings(frames, 4, fuse, freenoise=True)), noise())
        assert torch.equal(found, plain)


def fused_by_hand(model, given, windows, fuse, anchor, negative_only=False) -> torch.Tensor:
    """One step to the end, window by window, averaged."""
    total, shares = torch.zeros_like(given), torch.zeros(len(given), 1, 1, 1)
    for number, frames in enumerate(windows):
        picture = None
        if number and anchor == "window start":
            picture = (total / shares)[frames[:1]]
        elif number and anchor == "none":
            picture = torch.zeros(1, 4, SIZE, SIZE)
        made = sample(model, given[frames], steps=1, picture=picture, negative_only=negative_only)
        weights = fuse_weights(windows, number, fuse).view(-1, 1, 1, 1)
        total[frames] += made * weights
        shares[frames] += weights
    return total / shares


@pytest.mark.parametrize(
    ("fuse", "anchor"), [("pyramid", "window start"), ("overlap-linear", "first picture"), ("flat", "none")]
)
def test_a_fused_step_is_the_mean_of_its_windows(model, fuse, anchor) -> None:
    given, windows = noise(), split_windows(FRAMES, WINDOW, OVERLAP)
    expected = fused_by_hand(model, given, windows, fuse, anchor)
    found = sample(with_windows(model, WindowSettings(WINDOW, OVERLAP, fuse, anchor)), given, steps=1)
    assert svd.relative_error(found, expected) < ROUNDING


def test_fused_guidance_runs_over_the_whole_clip(model) -> None:
    given, windows = noise(), split_windows(FRAMES, WINDOW, OVERLAP)
    yes, no = (fused_by_hand(model, given, windows, "flat", "window start", only) for only in (False, True))
    expected = no + torch.linspace(1.0, 3.0, FRAMES).view(-1, 1, 1, 1) * (yes - no)
    found = sample(guided(with_windows(model, WindowSettings(WINDOW, OVERLAP, "flat")), 1.0), given, steps=1, cfg=3.0)
    assert svd.relative_error(found, expected) < ROUNDING
    assert svd.relative_error(found, no + 2.0 * (yes - no)) > 0.05


def embed(frame: torch.Tensor) -> torch.Tensor:
    """An embedding [1, 1, D] that depends on a frame."""
    return frame.flatten().tanh().repeat(svd.CONTEXT // frame.numel()).view(1, 1, -1)


def sequential_by_hand(model, given, windows, anchor, min_cfg, cfg, embed=None) -> torch.Tensor:
    """Each window by the host's own inpainting, with the guidance of its place in the clip."""
    clip = torch.zeros_like(given)
    scale = torch.linspace(min_cfg, cfg, len(given)).view(-1, 1, 1, 1)
    for number, frames in enumerate(windows):
        placed = model.clone()
        placed.set_model_sampler_cfg_function(
            lambda args, part=scale[frames]: args["uncond"] + part * (args["cond"] - args["uncond"])
        )
        picture = None
        if number and anchor != "first picture":
            picture = clip[frames[:1]] if anchor == "window start" else torch.zeros(1, 4, SIZE, SIZE)
        embedding = embed(clip[frames[:1]]) if number and embed is not None else None
        mask = continuation_mask(windows, number).view(-1, 1, 1, 1).expand(-1, 1, SIZE, SIZE) if number else None
        clip[frames] = sample(
            placed, given[frames], cfg=cfg, picture=picture, embedding=embedding, latent=clip[frames], mask=mask
        )
    return clip


@pytest.mark.parametrize(("anchor", "closed_loop"), [*((anchor, False) for anchor in ANCHORS), ("window start", True)])
def test_sequential_windows_go_on_from_each_other(model, anchor, closed_loop) -> None:
    given, windows = noise(), split_windows(FRAMES, WINDOW, OVERLAP, closed_loop)
    expected = sequential_by_hand(model, given, windows, anchor, 1.0, 3.0)
    settings = WindowSettings(WINDOW, OVERLAP, "sequential", anchor, closed_loop=closed_loop)
    found = sample(guided(with_windows(model, settings), 1.0), given, cfg=3.0)
    print(f"relative error {svd.relative_error(found, expected):.1e}")
    assert svd.relative_error(found, expected) < ROUNDING


def test_windows_are_conditioned_on_the_embedding_of_their_own_first_frame(model) -> None:
    given, windows, settings = noise(), split_windows(FRAMES, WINDOW, OVERLAP), WindowSettings(WINDOW, OVERLAP)
    expected = sequential_by_hand(model, given, windows, "window start", 1.0, 3.0, embed)
    found = sample(guided(with_windows(model, settings, embed), 1.0), given, cfg=3.0)
    without = sample(guided(with_windows(model, settings), 1.0), given, cfg=3.0)
    assert svd.relative_error(found, expected) < ROUNDING
    assert svd.relative_error(without, expected) > 0.05


@pytest.mark.parametrize("anchor", ["first picture", "none"])
def test_windows_with_another_anchor_keep_the_first_frames_embedding(model, anchor) -> None:
    settings = WindowSettings(WINDOW, OVERLAP, "sequential", anchor)
    assert torch.equal(
        sample(with_windows(model, settings, embed), noise()), sample(with_windows(model, settings), noise())
    )


@pytest.mark.parametrize("fuse", ["sequential", "pyramid"])
def test_no_call_sees_more_than_a_window_and_room_is_made_for_one(pair, fuse) -> None:
    """Whether the extension comes before or after the windows."""
    settings, room, seen = WindowSettings(WINDOW, OVERLAP, fuse), [], []

    def note(executor, patcher, noise_shape, *rest, **named):
        room.append(list(noise_shape))
        return executor(patcher, noise_shape, *rest, **named)

    def see(executor, x, *rest, **named):
        seen.append(len(x))
        return executor(x, *rest, **named)

    for model in (
        with_windows(apply_extension(pair.base, pair.extension), settings),
        apply_extension(with_windows(pair.base, settings), pair.extension),
    ):
        room.clear()
        seen.clear()
        model.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, "test", note)
        model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", see)
        sample(model, noise(), steps=1)
        assert room and all(shape == [WINDOW, 4, SIZE, SIZE] for shape in room)
        assert set(seen) == {WINDOW} and len(seen) == len(split_windows(FRAMES, WINDOW, OVERLAP))


@pytest.mark.parametrize("fuse", ["sequential", "flat"])
def test_given_frames_stay_as_given(model, fuse) -> None:
    latent, mask = torch.zeros(FRAMES, 4, SIZE, SIZE), torch.ones(FRAMES, 1, SIZE, SIZE)
    held = [0, 7, FRAMES - 1]
    latent[held] = torch.randn(3, 4, SIZE, SIZE, generator=torch.Generator().manual_seed(9))
    mask[held] = 0
    found = sample(with_windows(model, WindowSettings(WINDOW, OVERLAP, fuse)), noise(), latent=latent, mask=mask)
    torch.testing.assert_close(found[held], latent[held], rtol=1e-5, atol=1e-5)
    free = [frame for frame in range(FRAMES) if frame not in held]
    plain = sample(with_windows(model, WindowSettings(WINDOW, OVERLAP, fuse)), noise())
    assert svd.relative_error(found[free], plain[free]) > 1e-3
    assert found[free].abs().min(1).values.max() > 0


@pytest.mark.parametrize("fuse", ["sequential", "pyramid"])
def test_cancelled_in_the_middle_of_a_window_nothing_is_left_behind(model, fuse) -> None:
    windowed = with_windows(model, WindowSettings(WINDOW, OVERLAP, fuse))
    expected, plain = sample(windowed, noise()), sample(model, noise())
    calls = []

    def cancel(step, denoised, x, steps):
        calls.append((step, steps, len(denoised)))
        if len(calls) == (3 if fuse == "sequential" else 1):
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(windowed, noise(), callback=cancel)
    steps = 2 * len(split_windows(FRAMES, WINDOW, OVERLAP)) if fuse == "sequential" else 2
    assert calls == [(step, steps, FRAMES) for step in range(len(calls))]
    assert torch.equal(sample(windowed, noise()), expected)
    assert torch.equal(sample(model, noise()), plain)


def test_an_svd_without_an_extension_takes_windows_too(pair) -> None:
    found = sample(with_windows(pair.base, WindowSettings(WINDOW, OVERLAP)), noise())
    own = slice(WINDOW - OVERLAP)  # what follows goes over into the next window
    assert svd.relative_error(found[own], sample(pair.base, noise()[:WINDOW])[own]) < ROUNDING


def test_windows_that_cannot_be_are_refused(pair, model) -> None:
    with pytest.raises(ValueError, match="Lower window_frames to 128"):
        with_windows(model, WindowSettings(129, 32))
    assert with_windows(apply_extension(pair.base, pair.extension, positions="stretch"), WindowSettings(129, 32))
    with pytest.raises(ValueError, match="has to be smaller than the window"):
        with_windows(model, WindowSettings(8, 8))


def test_a_tiled_step_is_the_blend_of_its_tiles(model) -> None:
    """By hand for two tiles side by side; one that holds the picture changes nothing."""
    given = noise(4, 16)
    picture = conditioning(16)[0][0][1]["concat_latent_image"]
    left, right = (sample(model, given[..., a:b], steps=1, picture=picture[..., a:b]) for a, b in ((0, 10), (6, 16)))
    fade = torch.tensor([4, 3, 2, 1]) / 5
    expected = torch.cat([left[..., :6], left[..., 6:] * fade + right[..., :4] * (1 - fade), right[..., 4:]], -1)
    found = sample(with_tiles(model, TileSettings(10, 16, 4)), given, steps=1)
    assert svd.relative_error(found, expected) < ROUNDING
    assert torch.equal(sample(with_tiles(model, TileSettings(16, 16, 4)), given), sample(model, given))


def test_tiles_and_windows_go_together(model) -> None:
    seen = []

    def see(executor, x, *rest, **named):
        seen.append(tuple(x.shape))
        return executor(x, *rest, **named)

    windows, tiles = WindowSettings(WINDOW, OVERLAP, "flat", "first picture"), TileSettings(10, 10, 4)
    results = []
    for both in (with_tiles(with_windows(model, windows), tiles), with_windows(with_tiles(model, tiles), windows)):
        seen.clear()
        both.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", see)
        results.append(sample(both, noise(FRAMES, 16), steps=1))
        assert set(seen) == {(WINDOW, 8, 10, 10)} and len(seen) == len(split_windows(FRAMES, WINDOW, OVERLAP)) * 4
    assert svd.relative_error(*results) < ROUNDING  # averages over windows and over tiles commute
    untiled = sample(with_windows(model, windows), noise(FRAMES, 16), steps=1)
    assert svd.relative_error(results[0], untiled) > 1e-3


def test_a_sampled_frame_has_the_embedding_of_its_picture() -> None:
    from exvideo_core.comfyui.checkpoint.load import load_checkpoint
    from exvideo_core.comfyui.vae.conditioning import embedding_of_frame, encode_conditioning
    from small_model import recipe, world

    _, clip_vision, vae = load_checkpoint(str(recipe.CHECKPOINT))
    pictures = [torch.from_numpy(world.render(world.sample(seed), 1)) for seed in (0, 1)]
    same, other = (
        encode_conditioning(
            clip_vision, vae, picture, width=world.SIZE, height=world.SIZE, fps=30, motion_bucket_id=127,
            noise_aug_strength=0.0, seed=0,
        )[0][0][0]
        for picture in pictures
    )  # fmt: skip
    found = embedding_of_frame(clip_vision, vae, vae.encode(pictures[0]))
    assert found.shape == same.shape == (1, 1, other.shape[-1])
    assert svd.relative_error(found, same) < svd.relative_error(found, other) / 4  # the VAE changes the picture
