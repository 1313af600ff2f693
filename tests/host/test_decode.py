"""Decoding: the host's decoder on the same frames, whatever memory is free; and straight into a file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import comfy.model_management
import pytest
import torch

import svd
from exvideo_core.choices import CODECS, Blend
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.comfyui.low_memory.host_buffers import HostBuffers
from exvideo_core.comfyui.vae import chunked_decoder
from exvideo_core.comfyui.vae import decode as decode_module
from exvideo_core.comfyui.vae.decode import decode
from exvideo_core.video.blending import segment_weights, split_segments
from runner.hosts import PACK
from small_model import recipe, world


@pytest.fixture(scope="module")
def vae(small_models):
    return load_checkpoint(str(small_models[0]))[2]


def latents(frames: int, height: int = 8, width: int = 12) -> torch.Tensor:
    return torch.randn(frames, 4, height, width, generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_chunk_is_what_the_hosts_decoder_makes_of_it(vae, monkeypatch) -> None:
    given = latents(5)
    expected = ((vae.first_stage_model.decode(given) + 1) / 2).clamp(0, 1).movedim(1, -1)
    for size in (1, 100_003, 2**40):
        monkeypatch.setattr(chunked_decoder, "_CHUNK_BYTES", size)
        assert svd.relative_error(chunked_decoder.decode_segment(vae, given), expected) < 2e-6


def test_free_memory_does_not_change_the_pictures(vae, monkeypatch) -> None:
    given = latents(13)
    found = []
    for free in (1, 2**40):
        monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_, f=free, **__: f)
        found.append(decode(vae, given, 8, 4, "smooth"))
    assert found[0].equal(found[1])


@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_feature_maps_in_host_memory_change_nothing(vae, monkeypatch, share: float) -> None:
    """None, some or all of the frames' feature maps on the device: the same pictures to the bit."""
    given = latents(13)
    expected = chunked_decoder.decode_segment(vae, given)
    last = vae.first_stage_model.decoder.up[0].block[0]
    working = 5 * max(64 * 8 * 12 * 4 * last.in_channels, chunked_decoder._CHUNK_BYTES)
    maps = 13 * 64 * 8 * 12 * 4 * (last.in_channels / 4 + last.out_channels)
    held = []
    take = HostBuffers.take
    monkeypatch.setattr(HostBuffers, "take", lambda self, like: held.append(len(like)) or take(self, like))
    monkeypatch.setattr(chunked_decoder, "_max_bytes", lambda device: working + share * maps)
    assert chunked_decoder.decode_segment(vae, given).equal(expected)
    assert bool(held) == (share < 1.0) and max(held, default=0) <= 13


def test_the_chunks_of_a_clip_share_pinned_memory(vae, monkeypatch) -> None:
    """To pin gigabytes takes longer than to decode: not once a chunk."""
    pinned: list[int] = []

    def count(frames: int) -> int:
        pinned.clear()
        buffers = HostBuffers(lambda buffer: not pinned.append(buffer.nbytes), lambda buffer: None)
        monkeypatch.setattr(decode_module, "host_buffers", lambda device: buffers)
        decode(vae, latents(frames), 8, 4, "smooth")
        return len(pinned)

    monkeypatch.setattr(chunked_decoder, "_max_bytes", lambda device: 0.0)
    assert count(8) == count(16) > 0  # one chunk, three of them


def test_a_card_that_refuses_is_asked_once_more_for_less(vae, monkeypatch) -> None:
    given = latents(5)
    expected = chunked_decoder.decode_segment(vae, given)
    asked, freed = [], []
    real = chunked_decoder._decode_in_chunks

    def refuse(vae, module, latents, chunk_bytes, most, buffers):  # noqa: ANN001, ANN202
        asked.append((chunk_bytes, most))
        if len(asked) <= refused:
            raise comfy.model_management.OOM_EXCEPTION("no room")
        return real(vae, module, latents, chunk_bytes, most, buffers)

    monkeypatch.setattr(chunked_decoder, "_decode_in_chunks", refuse)
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda *given, **named: freed.append(given))
    refused = 1
    assert svd.relative_error(chunked_decoder.decode_segment(vae, given), expected) < 2e-6
    assert asked[1][0] < asked[0][0] and asked[1][1] == 0.0 and len(freed) == 1
    asked.clear()
    refused = 2
    with pytest.raises(comfy.model_management.OOM_EXCEPTION, match="5 frames of 96x64.*latents are kept"):
        chunked_decoder.decode_segment(vae, given)


@pytest.mark.parametrize("blend", ["smooth", "linear"])
@pytest.mark.parametrize(("frames", "size", "overlap"), [(1, 8, 4), (8, 8, 4), (13, 8, 4), (13, 5, 4), (9, 3, 0)])
def test_chunks_are_blended_as_weighted_sums(vae, frames, size, overlap, blend) -> None:
    """Every chunk times its weights, summed and divided by their sum; frames come out once and in order."""

    given = latents(frames)
    total, weight = 0.0, torch.zeros(frames, 1, 1, 1)
    for start, end in split_segments(frames, size, overlap):
        shares = segment_weights(start, end, frames, overlap, blend).view(-1, 1, 1, 1)
        part = torch.zeros(frames, 64, 96, 3)
        part[start:end] = chunked_decoder.decode_segment(vae, given[start:end]) * shares
        total = total + part
        weight[start:end] += shares
    torch.testing.assert_close(decode(vae, given, size, overlap, blend), total / weight, rtol=0, atol=1e-5)


def pan(picture: str) -> torch.Tensor:
    """A picture panned across the frame, [96, 64, 64, 3]: a photograph, or one that the small VAE was trained on."""
    import numpy as np
    from PIL import Image

    if picture == "photograph":
        with Image.open(PACK / "tests" / "pictures" / "astronaut.jpg") as file:
            wide = np.asarray(file.convert("RGB").resize((256, 256)), np.float32)[96:160] / 255
    else:
        wide = np.concatenate([world.render(world.sample(world.HELD_OUT), 1)[0]] * 5, axis=1).astype(np.float32)
    return torch.from_numpy(np.stack([wide[:, 2 * step : 2 * step + 64] for step in range(96)]))


@pytest.mark.parametrize("picture", ["photograph", "shapes"])
def test_no_seam_shows_between_chunks(picture: str) -> None:
    """Through the trained VAE: at borders of chunks, frames differ by as much as elsewhere."""
    vae = load_checkpoint(str(recipe.CHECKPOINT))[2]
    given = vae.encode(pan(picture))

    def steps(clip: torch.Tensor) -> torch.Tensor:
        return (clip[1:] - clip[:-1]).abs().mean(dim=(1, 2, 3))

    whole = steps(decode(vae, given, 96, 0, "smooth"))

    def at_worst(size: int, overlap: int, blend: Blend) -> float:
        """Largest mean step of a place in the pattern of chunks over that of all, the clip's own motion taken out."""
        found = steps(decode(vae, given, size, overlap, blend))
        stride = size - overlap
        places = torch.stack([found[at::stride].mean() / whole[at::stride].mean() for at in range(stride)])
        return (places.max() / places.mean()).item()

    smooth, linear = at_worst(24, 12, "smooth"), at_worst(8, 4, "linear")
    print(f"{picture}: smooth {smooth:.2f}, the reference's {linear:.2f}")
    assert smooth < 1.05
    assert linear > 1.15  # what it would be seen by


@pytest.mark.parametrize(
    ("fps", "rate"),
    [
        (30, Fraction(30)),
        (30.0, Fraction(30)),
        (12.5, Fraction(25, 2)),
        (23.976, Fraction(24000, 1001)),
        (24000 / 1001, Fraction(24000, 1001)),
        (29.97, Fraction(30000, 1001)),
        (59.94, Fraction(60000, 1001)),
        (23.98, Fraction(1199, 50)),
        (0.1 + 0.2, Fraction(3, 10)),
        (240, Fraction(240)),
    ],
)
def test_a_file_has_the_frame_rate_that_was_asked_for(tmp_path: Path, fps: float, rate: Fraction) -> None:
    import av
    import numpy as np

    from exvideo_core.video.writer import VideoWriter, frame_rate

    assert frame_rate(fps) == rate
    clip = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    for name, codec in CODECS.items():
        path = tmp_path / f"clip{codec.suffix}"
        with VideoWriter(path, fps, name) as writer:
            writer.add(clip)
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            if codec.suffix == ".mp4":
                assert stream.average_rate == rate
            else:  # Matroska counts milliseconds: FFmpeg guesses the rate from them
                assert float(stream.average_rate) == pytest.approx(float(rate), rel=1e-4)
            times = [float(frame.pts * stream.time_base) for frame in container.decode(video=0)]
        assert times == pytest.approx([index / rate for index in range(12)], abs=0.6e-3)


@pytest.mark.parametrize("fps", [float("nan"), float("inf"), 0, -1])
def test_a_file_of_no_frame_rate_is_refused(tmp_path: Path, fps: float) -> None:
    from exvideo_core.video.writer import VideoWriter

    with pytest.raises(ValueError, match=rf"fps \({fps}\) has to be a positive number"):
        VideoWriter(tmp_path / "clip.mp4", fps)


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    import av
    import numpy as np

    from exvideo_core.video.writer import VideoWriter

    clip = np.random.default_rng(0).integers(0, 256, (6, 64, 80, 3), dtype=np.uint8)
    for name, codec in CODECS.items():
        path = tmp_path / f"clip{codec.suffix}"
        with VideoWriter(path, 30, name, 10, {"prompt": '{"a": 1}'}) as writer:
            writer.add(clip[:2])
            writer.add(clip[2:])
            assert not path.exists()
        with av.open(str(path)) as container:
            found = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
            assert container.streams.video[0].average_rate == 30
        assert len(found) == 6
        if "lossless" in name:
            assert np.array_equal(np.stack(found), clip)
        path.unlink()
    with pytest.raises(RuntimeError, match="cancelled"), VideoWriter(tmp_path / "clip.mp4", 30) as writer:
        writer.add(clip)
        raise RuntimeError("cancelled")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="even"), VideoWriter(tmp_path / "clip.mp4", 30) as writer:
        writer.add(clip[:, :63])
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="at least 64x64"), VideoWriter(tmp_path / "clip.mp4", 30, "h265") as writer:
        writer.add(clip[:, :, :48])
    assert list(tmp_path.iterdir()) == []
