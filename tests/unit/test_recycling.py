"""Error recycling: which errors are kept, and which clips get one."""

from __future__ import annotations

import torch

from exvideo_core.post_tuning.recycling import ErrorBank
from exvideo_core.post_tuning.samples import Sample

SCALING = 0.18215


def sample_of(sigma: list[float], frames: int = 3) -> Sample:
    clips = len(sigma)
    return Sample(
        latents=torch.randn(clips, frames, 4, 2, 2), noise=torch.zeros(clips, frames, 4, 2, 2),
        sigma=torch.tensor(sigma), first=torch.randn(clips, 4, 2, 2), embedding=torch.zeros(clips, 1, 8),
        ids=torch.zeros(clips, 3),
    )  # fmt: skip


def test_only_errors_of_low_noise_are_kept_and_the_latest_stay() -> None:
    bank = ErrorBank(3, 1.0, 10.0, SCALING, 0)
    sample = sample_of([0.5, 50.0])
    assert bank.add_errors(sample, range(2)) is sample  # nothing to recycle yet
    for step in range(5):
        bank.add(sample.latents + step, sample, range(2 * step, 2 * step + 2))
    torch.testing.assert_close(bank.errors, torch.arange(2.0, 5.0).view(3, 1, 1, 1).expand(3, 4, 2, 2))


def test_a_share_of_clips_gets_an_error_on_its_first_frame_alone() -> None:
    bank = ErrorBank(8, 0.25, 10.0, SCALING, 0)
    sample = sample_of([1.0] * 4)
    bank.add(sample.latents + 1, sample, range(4))
    changed = 0
    for number in range(0, 400, 4):
        corrupted = bank.add_errors(sample, range(number, number + 4))
        moved = (corrupted.first - sample.first).flatten(1)
        changed += int(moved.any(1).sum())
        torch.testing.assert_close(moved[moved.any(1)] * SCALING, torch.ones_like(moved[moved.any(1)]))
        assert corrupted.latents is sample.latents
    assert 70 <= changed <= 130
    again = bank.add_errors(sample, range(8, 12)).first
    assert again.equal(bank.add_errors(sample, range(8, 12)).first)


def test_a_bank_is_kept_in_checkpoints() -> None:
    bank, other = (ErrorBank(8, 1.0, 10.0, SCALING, 0) for _ in range(2))
    sample = sample_of([1.0])
    bank.add(sample.latents + 1, sample, range(1))
    other.load_state_dict(bank.state_dict())
    assert other.add_errors(sample, range(1)).first.equal(bank.add_errors(sample, range(1)).first)
