"""Plays the clip as it is so far in the sampler's node, where the host itself shows its first frame only.

Pictures go through the host's own preview channel, one after the other, so that every frontend and every client that
shows previews shows a moving one.
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

from ..wrappers import around_callback

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

    from ..wrappers import StepCallback

_KEY = "exvideo_preview"
#: Shares of the time that making pictures and sending them may take. Two full cores make it about twice as much.
_MAKING, _SENDING = 0.003, 0.004
_PER_SECOND = 8.0
_MOST_PICTURES = 128


def play_while_sampling(patched: ModelPatcher) -> None:
    """Give a clone the preview. It follows the user's own choice of previews, and is off where they are off."""
    around_callback(patched, _KEY, _played)


def _played(
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
    player = Player(previewer, callback)
    try:
        return run(player.step)
    finally:
        player.stop()


class Player:
    """Shows a step's frames in turn until the next step has some.

    Args:
        previewer: the host's.
        callback: the host's, for every step.
    """

    def __init__(self, previewer: latent_preview.LatentPreviewer, callback: Callable[..., None]) -> None:
        self._previewer, self._callback = previewer, callback
        self._lock = threading.Lock()  # so that progress is never reported as it was a step ago
        self._ended = threading.Event()
        self._pictures: list[Image] = []
        self._format: tuple[str, int | None] | None = None  # the host's, once it has been asked
        self._progress = (0, 1)
        self._rest: float | None = None  # between pictures; known once one has been encoded
        self._allowance, self._since, self._cost = 0.0, time.perf_counter(), 0.0
        self._thread: threading.Thread | None = None
        self._works = True

    def step(self, step: int, denoised: torch.Tensor, x: torch.Tensor, steps: int) -> None:
        """The host's callback of a step, and new pictures if they cost little against what the step took."""
        with self._lock:
            self._callback(step, denoised, x, steps)
            now = time.perf_counter()
            self._allowance += (now - self._since) * _MAKING
            self._since = now
            self._progress = (step + 1, steps)
            if self._works and self._allowance > self._cost:
                try:
                    self._make(denoised)
                except Exception as error:  # noqa: BLE001 - another pack's code; a preview is not worth a run
                    self._off(error)
                self._allowance -= time.perf_counter() - now
        if self._pictures and self._thread is None:
            # In a copy of this context: the host finds there which node is running.
            context = contextvars.copy_context()
            self._thread = threading.Thread(target=context.run, args=(self._play,), name=_KEY, daemon=True)
            self._thread.start()

    def _make(self, denoised: torch.Tensor) -> None:
        """As many pictures, evenly over the clip, as may be made."""
        began = time.perf_counter()
        frames = denoised.flatten(1).any(1).nonzero()[:, 0].tolist()  # windows to come are still zero
        if not frames:
            return
        first = denoised[frames[0]][None]
        picture = self._previewer.decode_latent_to_preview(first)
        if self._format is None:
            # Asked for a picture to send, ComfyUI-VideoHelperSuite's previewer would announce a clip of one frame.
            shown = isinstance(picture, Image)
            answer = self._previewer.decode_latent_to_preview_image("JPEG", first) if shown else None
            if answer is None:  # as of previewers that show their pictures by themselves
                self._works = False
                logging.info("The clip is not played while it samples: another preview shows it.")
                return
            self._format = answer[0], answer[2]
        each = time.perf_counter() - began
        count = int(min(len(frames), _MOST_PICTURES, max(self._allowance / max(each, 1e-6), 1)))
        chosen = [frames[i * len(frames) // count] for i in range(1, count)]
        self._pictures = [picture, *(self._previewer.decode_latent_to_preview(denoised[i][None]) for i in chosen)]
        self._cost = time.perf_counter() - began
        if self._rest is None:
            self._rest = max(1 / _PER_SECOND, _seconds_to_send(picture, *self._format) / _SENDING)

    def _play(self) -> None:
        shown = 0
        bar = comfy.utils.ProgressBar(1)
        while not self._ended.wait(self._rest):
            with self._lock:
                if not self._works:
                    return
                shown = (shown + 1) % len(self._pictures)
                assert self._format is not None
                kind, most = self._format
                try:
                    bar.update_absolute(*self._progress, (kind, self._pictures[shown], most))
                except comfy.model_management.InterruptProcessingException:
                    # The host takes a cancellation back when it tells of it; it is the sampler that has to hear.
                    comfy.model_management.interrupt_current_processing()
                    return
                except Exception as error:  # noqa: BLE001 - as above
                    self._off(error)
                    return

    def _off(self, error: Exception) -> None:
        """No more pictures in this run."""
        self._works = False
        self._pictures = []
        logging.warning("The clip is not played while it samples: its preview failed (%s).", error)

    def stop(self) -> None:
        """Show nothing more."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()


def _seconds_to_send(picture: Image, kind: str, most: int | None) -> float:
    """What the host's server will need for a picture: it is encoded there."""
    began = time.perf_counter()
    scaled = picture if most is None else ImageOps.contain(picture, (most, most))
    scaled.save(io.BytesIO(), format=kind, quality=95)
    return time.perf_counter() - began
