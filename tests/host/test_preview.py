"""The preview that plays the clip: what goes through the host's progress channel while it samples."""

from __future__ import annotations

import threading
import time

import comfy.cli_args
import comfy.model_management
import comfy.sample
import comfy.utils
import latent_preview
import pytest
import torch
from comfy.latent_formats import SD15

import svd
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.sampling import preview
from exvideo_core.comfyui.sampling.preview import PreviewPlayer


@pytest.fixture
def messages(monkeypatch):
    """What the host would send: (step, steps, mean of the picture or None, thread)."""
    found = []

    def hook(value, total, preview, **named):  # noqa: ANN001
        mean = None if preview is None else sum(preview[1].convert("L").tobytes()) / preview[1].width
        found.append((value, total, mean, threading.current_thread().name))

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", latent_preview.LatentPreviewMethod.Auto)
    for share in ("_DECODING", "_SENDING"):  # so that what is shown does not hang on this machine's speed
        monkeypatch.setattr(preview, share, 0.5)
    return found


def brightening(frames: int, size: int = 8) -> torch.Tensor:
    """Each frame lighter than the one before."""
    return torch.linspace(-1, 1, frames).view(-1, 1, 1, 1) * torch.ones(1, 4, size, size)


def player(steps: int = 4) -> PreviewPlayer:
    previewer = latent_preview.get_previewer(torch.device("cpu"), SD15())
    bar = comfy.utils.ProgressBar(steps)

    def callback(step, denoised, x, total):  # noqa: ANN001
        bar.update_absolute(step + 1, total, previewer.decode_latent_to_preview_image("JPEG", denoised))

    return PreviewPlayer(previewer, callback)


def test_frames_are_shown_in_turn_and_progress_never_runs_back(messages) -> None:
    watched, clip = player(), brightening(12)
    for step in range(2):
        time.sleep(1.0)
        watched.step(step, clip, clip, 4)
    time.sleep(2.0)
    watched.stop()
    count = len(messages)
    assert [value for value, *_ in messages] == sorted(value for value, *_ in messages)
    shown = [mean for _, _, mean, thread in messages if thread == "exvideo_preview"]
    assert len(shown) >= 6 and len(set(shown)) >= 5
    time.sleep(0.3)
    assert len(messages) == count  # nothing more once it is stopped


def test_windows_that_are_still_to_come_are_not_shown(messages) -> None:
    watched, clip = player(), brightening(12)
    clip[6:] = 0
    time.sleep(1.0)
    watched.step(0, clip, clip, 4)
    time.sleep(2.0)
    watched.stop()
    empty = latent_preview.get_previewer(torch.device("cpu"), SD15()).decode_latent_to_preview(torch.zeros(1, 4, 8, 8))
    grey = sum(empty.convert("L").tobytes()) / empty.width
    shown = [mean for *_, mean, thread in messages if thread == "exvideo_preview"]
    assert shown and grey not in shown


def test_steps_too_short_for_pictures_go_without(messages) -> None:
    watched, clip = player(), brightening(64, 64)
    watched._cost = 0.05  # what pictures took last time
    for step in range(4):
        watched.step(step, clip, clip, 4)
    watched.stop()
    assert [thread for *_, thread in messages] == ["MainThread"] * 4


def test_a_cancellation_that_the_preview_hears_of_reaches_the_sampler(monkeypatch) -> None:
    """The host's hook raises it in whichever thread calls first, and takes it back."""

    def hook(value, total, preview, **named):  # noqa: ANN001
        comfy.model_management.throw_exception_if_processing_interrupted()

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", latent_preview.LatentPreviewMethod.Auto)
    for share in ("_DECODING", "_SENDING"):
        monkeypatch.setattr(preview, share, 0.5)
    watched, clip = player(), brightening(12)
    time.sleep(1.0)
    watched.step(0, clip, clip, 4)
    comfy.model_management.interrupt_current_processing()
    watched._thread.join(5)
    assert not watched._thread.is_alive()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        comfy.model_management.throw_exception_if_processing_interrupted()
    watched.stop()


def _fails(latent_format, x0):  # noqa: ANN001, ANN202
    raise KeyError("no such decoder")


@pytest.mark.parametrize("answer", [lambda *_: None, lambda *_: ("JPEG", b"not a picture", None), _fails])
def test_a_preview_of_another_kind_ends_no_run(messages, caplog, answer) -> None:
    """Other packs' previewers answer None, having shown their pictures themselves, or whatever they like."""
    watched, clip = player(), brightening(12)
    watched._previewer = type("Other", (), {"decode_latent_to_preview_image": answer})()
    caplog.set_level("INFO")
    for step in range(3):
        time.sleep(0.5)
        watched.step(step, clip, clip, 4)
    watched.stop()
    assert [value for value, *_, thread in messages if thread == "MainThread"] == [1, 2, 3]
    assert not [thread for *_, thread in messages if thread == "exvideo_preview"]
    assert len([record for record in caplog.records if "preview is off" in record.message]) == 1


def test_pictures_that_cannot_be_sent_end_no_run(messages, caplog, monkeypatch) -> None:
    def hook(value, total, preview, **named):  # noqa: ANN001
        if threading.current_thread().name == "exvideo_preview":
            raise OSError("no client")

    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    watched, clip = player(), brightening(12)
    for step in range(3):
        time.sleep(1.0)
        watched.step(step, clip, clip, 4)
    watched.stop()
    assert len([record for record in caplog.records if "no client" in record.message]) == 1


def run(model, **named) -> torch.Tensor:
    given = torch.randn(12, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    embedding = torch.randn(1, 1, svd.CONTEXT, generator=torch.Generator().manual_seed(5))
    cond = [[embedding, {"concat_latent_image": torch.zeros(1, 4, 8, 8)}]]
    return comfy.sample.sample(
        model, given, 3, 1.0, "euler", "karras", cond, cond, torch.zeros_like(given), seed=1, disable_pbar=True,
        callback=latent_preview.prepare_callback(model, 3), **named,
    )  # fmt: skip


def test_sampling_shows_more_than_the_first_frame_and_gives_the_same(messages, monkeypatch) -> None:
    pair = svd.make_pair()
    model = apply_extension(pair.base, pair.extension)
    found = run(model)
    assert any(thread == "exvideo_preview" for *_, thread in messages)
    assert not any(thread.name == "exvideo_preview" for thread in threading.enumerate())
    messages.clear()
    monkeypatch.setattr(comfy.cli_args.args, "preview_method", latent_preview.LatentPreviewMethod.NoPreviews)
    assert torch.equal(run(model), found)
    assert messages and all(mean is None and thread == "MainThread" for _, _, mean, thread in messages)
