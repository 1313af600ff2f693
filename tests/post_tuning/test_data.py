"""Training data: what is usable, what is left out and said, and which samples a run sees."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from exvideo_core.post_tuning.config import ConfigError
from exvideo_core.post_tuning.motion import THRESHOLDS, motion_bucket
from exvideo_core.post_tuning.videos import read_window, scan
from small_model import videos as writer
from small_model import world


@pytest.fixture
def mixed(videos: Path, tmp_path: Path) -> Path:
    """Four good videos, one cut off, one that is none, one too short."""
    folder = tmp_path / "mixed"
    shutil.copytree(videos, folder)
    (folder / "metadata.json").unlink()
    good = (folder / "000000.mkv").read_bytes()
    (folder / "cut.mkv").write_bytes(good[: len(good) // 3])
    (folder / "text.mp4").write_text("this is no video")
    writer.write(folder / "short", clips=1, frames=3)
    return folder


def test_bad_videos_are_left_out_and_listed(mixed: Path) -> None:
    found = scan(mixed, 6, 64, 64)
    assert [video.path.name for video in found.videos] == ["000000.mkv", "000001.mkv", "000002.mkv", "000003.mkv"]
    reasons = {path.relative_to(mixed).as_posix(): reason for path, reason in found.skipped}
    assert set(reasons) == {"cut.mkv", "text.mp4", "short/000000.mkv"}
    assert reasons["short/000000.mkv"] == "has 3 frames, but a training clip needs 6"


def test_a_run_on_them_trains_and_writes_the_list(mixed: Path, run) -> None:
    done = run(data=mixed, steps=2)
    text = done.finish()
    listed = (done.out / "skipped.txt").read_text()
    assert "4 usable videos, 3 skipped" in text
    assert all(name in listed for name in ("cut.mkv", "text.mp4", "000000.mkv"))


@pytest.mark.parametrize("width", [256, 64])
def test_no_usable_video_is_an_error_before_training(tmp_path: Path, run, width: int) -> None:
    folder = tmp_path / "data"
    if width == 256:  # 64 pixels would have to be blown up fourfold
        writer.write(folder, clips=1, frames=10)
    else:
        folder.mkdir()
    refused = run(data=folder, width=width, height=width)
    text, _ = (process := refused.start()).communicate(timeout=120)
    assert process.returncode == 2 and "no usable video" in text and str(folder) in text
    assert not refused.out.exists()


def test_metadata_says_which_videos_count_and_how_they_move(videos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "listed"
    shutil.copytree(videos, folder)
    (folder / "metadata.json").write_text(
        json.dumps([{"path": "000002.mkv", "motion_bucket_id": 77}, {"path": "x.mkv"}])
    )
    found = scan(folder, 6, 64, 64)
    assert [(video.path.name, video.motion_bucket) for video in found.videos] == [("000002.mkv", 77)]
    assert [path.name for path, _ in found.skipped] == ["x.mkv"]
    (folder / "metadata.json").write_text('{"path": 1}')
    with pytest.raises(ConfigError, match="metadata.json"):
        scan(folder, 6, 64, 64)


def test_windows_are_the_videos_frames(videos: Path) -> None:
    truth = (world.render(world.sample(1), 10) * 255).round().astype(np.uint8)
    window = read_window(videos / "000001.mkv", 2, 3, 2, 64, 64).numpy()
    assert np.abs(window.astype(int) - truth[[2, 4, 6]]).max() <= 1
    with pytest.raises(ValueError, match="ends 1 frames early"):
        read_window(videos / "000001.mkv", 2, 5, 2, 64, 64)
    assert read_window(videos / "000001.mkv", 0, 2, 1, 128, 64).shape == (2, 64, 128, 3)


def test_motion_buckets_are_the_thresholds() -> None:
    assert len(THRESHOLDS) == 128 and list(THRESHOLDS) == sorted(THRESHOLDS)
    still = torch.zeros(4, 3, 8, 8)
    assert motion_bucket(still) == 0
    for bucket in (1, 60, 127):
        # Two values that alternate over 2 frames deviate by their difference / sqrt(2).
        size = (THRESHOLDS[bucket] + 1e-6) * 2**0.5
        assert motion_bucket(torch.stack([still[0], still[0] + size])) == bucket


def test_samples_do_not_depend_on_what_came_before(base: Path, videos: Path, tmp_path: Path) -> None:
    from exvideo_core.diffusers import checkpoint
    from exvideo_core.post_tuning.config import parse
    from exvideo_core.post_tuning.loss import sigma_ramp
    from exvideo_core.post_tuning.samples import Encoder, Samples, fill_cache

    given = {"base": base, "data": videos, "out": tmp_path, "frames": 6, "width": 64, "height": 64}
    config = parse([f"--{name}={value}" for name, value in given.items()])
    svd = checkpoint.load(base)
    found = scan(videos, config.span, 64, 64)
    encoder = Encoder(svd.vae, svd.image_encoder)
    assert [wrong for _, wrong in fill_cache(tmp_path / "cache", found.videos, config, encoder)] == [""] * 4
    samples = Samples(found.videos, config, encoder, tmp_path / "cache")
    forward = [samples[number] for number in range(12)]
    again = Samples(found.videos, config, encoder, tmp_path / "cache")
    for number in (11, 3, 0):
        for name, value in vars(forward[number]).items():
            assert value.equal(getattr(again[number], name)), name
    direct = Samples(found.videos, config, encoder, None)[5]
    torch.testing.assert_close(direct.latents, forward[5].latents, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(direct.embedding, forward[5].embedding, rtol=1e-4, atol=1e-4)
    first = forward[0]
    assert first.latents.shape == (1, 6, 4, 8, 8)
    torch.testing.assert_close(first.first, first.latents[:, 0] / 0.18215)
    assert {int(sample.ids[0, 1]) for sample in forward} <= set(world.SPEEDS) and first.ids[0, 0] == 29
    ramp = set(sigma_ramp().tolist())
    levels = [sample.sigma.item() for sample in forward]
    assert set(levels) <= ramp and len(set(levels)) > 8
    assert len({float(sample.noise.sum()) for sample in forward}) == 12
