"""Plays a preview of the whole video in the sampler's node, where ComfyUI itself shows only the first frame.

Images are sent through ComfyUI's own preview channel, one after the other, so that every frontend and client that shows
previews shows a moving one.
"""

from __future__ import annotations

import contextvars
import io
import logging
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

import comfy.model_management
import comfy.utils
import latent_preview
import torch
from PIL import ImageOps
from PIL.Image import Image

from ..wrappers import wrap_callback

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..wrappers import StepCallback

_KEY = "exvideo_preview"
#: Shares of the run time that decoding and sending images may take. On two busy cores it is about twice as much.
_DECODING, _SENDING = 0.003, 0.004
_IMAGES_PER_SECOND = 8.0
_MAX_IMAGES = 128


def add_preview(patched: ModelPatcher) -> None:
    """Add the preview to a clone. It follows the user's preview settings, and is off where previews are off."""
    wrap_callback(patched, _KEY, _sample_with_preview)


def _sample_with_preview(
    patcher: ModelPatcher,
    noise: torch.Tensor,
    callback: StepCallback,
    run: Callable[[StepCallback], torch.Tensor],
) -> torch.Tensor:
    previewer = None
    if callback is not None and len(noise) > 1 and comfy.utils.PROGRESS_BAR_HOOK is not None:
        previewer = latent_preview.get_previewer(patcher.load_device, patcher.model.latent_format)
    if previewer is None:
        return run(callback)
    player = PreviewPlayer(previewer, callback)
    try:
        return run(player.step)
    finally:
        player.stop()


class PreviewPlayer:
    """Shows a step's frames in turn until the next step delivers new ones.

    Args:
        previewer: ComfyUI's.
        callback: ComfyUI's step callback.
    """

    def __init__(self, previewer: latent_preview.LatentPreviewer, callback: Callable[..., None]) -> None:
        self._previewer, self._callback = previewer, callback
        self._lock = threading.Lock()  # so that progress never goes back a step
        self._ended = threading.Event()
        self._images: list[Image] = []
        self._format: tuple[str, int | None] | None = None  # of ComfyUI's previews, once it is known
        self._progress = (0, 1)
        self._interval: float | None = None  # between images; known once one has been encoded
        self._allowance, self._since, self._cost = 0.0, time.perf_counter(), 0.0
        self._thread: threading.Thread | None = None
        self._enabled = True

    def step(self, step: int, x0: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        """The step callback: calls ComfyUI's, and decodes new images if they cost little compared to the step."""
        with self._lock:
            self._callback(step, x0, x, steps)
            now = time.perf_counter()
            self._allowance += (now - self._since) * _DECODING
            self._since = now
            self._progress = (step + 1, steps)
            if self._enabled and self._allowance > self._cost:
                try:
                    self._decode(x0)
                except Exception as error:  # noqa: BLE001 - another pack's code; a preview is not worth failing a run
                    self._disable(error)
                self._allowance -= time.perf_counter() - now
        if self._images and self._thread is None:
            # In a copy of this context, where ComfyUI looks up which node is running.
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._play,), name=_KEY, daemon=True)
            self._thread.start()

    def _decode(self, x0: torch.Tensor) -> None:
        """Decode as many images as the time allows, evenly spaced over the video."""
        began = time.perf_counter()
        frames = x0.flatten(1).any(1).nonzero()[:, 0].tolist()  # windows to come are still zero
        if not frames:
            return
        first = x0[frames[0]][None]
        image = self._previewer.decode_latent_to_preview(first)
        if self._format is None:
            # Asked for an image to send, ComfyUI-VideoHelperSuite's previewer would announce a video of one frame.
            shown = isinstance(image, Image)
            answer = self._previewer.decode_latent_to_preview_image("JPEG", first) if shown else None
            if answer is None:  # from previewers that show their images themselves
                self._enabled = False
                logging.info("ExVideo's animated preview is off: another pack shows its own.")
                return
            self._format = answer[0], answer[2]
        each = time.perf_counter() - began
        count = int(min(len(frames), _MAX_IMAGES, max(self._allowance / max(each, 1e-6), 1)))
        chosen = [frames[i * len(frames) // count] for i in range(1, count)]
        self._images = [image, *(self._previewer.decode_latent_to_preview(x0[i][None]) for i in chosen)]
        self._cost = time.perf_counter() - began
        if self._interval is None:
            self._interval = max(1 / _IMAGES_PER_SECOND, _seconds_to_send(image, *self._format) / _SENDING)

    def _play(self) -> None:
        shown = 0
        bar = comfy.utils.ProgressBar(1)
        while not self._ended.wait(self._interval):
            with self._lock:
                if not self._enabled:
                    return
                shown = (shown + 1) % len(self._images)
                assert self._format is not None
                kind, max_size = self._format
                try:
                    bar.update_absolute(*self._progress, (kind, self._images[shown], max_size))
                except comfy.model_management.InterruptProcessingException:
                    # Raising this resets ComfyUI's interrupt flag, but it is the sampler that has to stop.
                    comfy.model_management.interrupt_current_processing()
                    return
                except Exception as error:  # noqa: BLE001 - as above
                    self._disable(error)
                    return

    def _disable(self, error: Exception) -> None:
        """Show no more images in this run."""
        self._enabled = False
        self._images = []
        logging.warning(
            "ExVideo's animated preview is off for this run: a frame could not be decoded or sent (%s).", error
        )

    def stop(self) -> None:
        """Stop showing images."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


def _seconds_to_send(image: Image, kind: str, max_size: int | None) -> float:
    """The time that ComfyUI's server will need to encode an image."""
    began = time.perf_counter()
    scaled = image if max_size is None else ImageOps.contain(image, (max_size, max_size))
    scaled.save(io.BytesIO(), format=kind, quality=95)
    return time.perf_counter() - began
