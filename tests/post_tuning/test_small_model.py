"""The small model's own training: encoded clips, the loop that resumes, and what held-out clips are measured by."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from exvideo_core.method import tensor_names
from small_model import world

FRAMES = 4
SCALING = 0.18215  # of SVD's VAE
_STORED = {
    "positions": tensor_names.POSITIONS, "conv_weight": tensor_names.CONV_WEIGHT, "conv_bias": tensor_names.CONV_BIAS
}  # fmt: skip


@pytest.fixture(scope="module")
def svd(base: Path):
    from exvideo_core.diffusers import checkpoint

    return checkpoint.load(base)


@pytest.fixture(scope="module")
def bank(svd):
    from small_model.bank import Bank

    return Bank.encode(svd.vae, svd.image_encoder, range(3), 12)


@pytest.fixture
def learner(base: Path):
    from exvideo_core.diffusers import checkpoint
    from exvideo_core.post_tuning.noise import noise_levels
    from small_model.training import Learner, Plan

    def make(**changes: object) -> Learner:
        unet = checkpoint.load(base).unet.train()
        plan = Plan(frames=FRAMES, batch=2, rate=1e-3, levels=noise_levels("lognormal"), weight=torch.ones_like,
                    warmup=1, steps=4)  # fmt: skip
        return Learner(unet, [(list(unet.parameters()), 1.0)], replace(plan, **changes))

    return make


def test_a_bank_holds_what_the_encoder_makes_of_the_worlds_pictures(svd, bank) -> None:
    from exvideo_core.post_tuning.samples import Encoder

    encoder = Encoder(svd.vae, svd.image_encoder)
    windows = bank.windows(torch.tensor([2]), torch.tensor([1]), FRAMES)
    pictures = world.as_bytes(world.render(world.sample(2), 12)[4:8])
    torch.testing.assert_close(windows.latents[0], encoder.latents(pictures), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(windows.embedding[0], encoder.embeddings(pictures[:1]), rtol=1e-3, atol=1e-3)
    assert windows.bucket.tolist() == [world.sample(2).motion_bucket]


def test_draws_are_windows_of_the_clips(bank) -> None:
    drawn = bank.draw(16, FRAMES, torch.Generator().manual_seed(0))
    starts = {tuple(bank.latents[clip, frame].flatten()[:3].tolist()) for clip in range(3) for frame in (0, 4, 8)}
    found = {tuple(window[0].flatten()[:3].tolist()) for window in drawn.latents}
    assert found <= starts and len(found) > 4


def test_hard_windows_are_those_with_the_largest_errors(svd, bank) -> None:
    from small_model.hard import with_hard

    def zeros(sample: torch.Tensor, *_: object, return_dict: bool) -> tuple[torch.Tensor]:
        return (torch.zeros_like(sample[:, :, :4]),)

    # Without the UNet's part, what is left of the latents is their share of the noisy ones: the larger, the more wrong.
    larger = replace(bank, latents=bank.latents * torch.tensor([1.0, 3.0, 2.0]).view(-1, 1, 1, 1, 1))
    for kept, expected in ((2, {(1, 0), (1, 1)}), (4, {(1, 0), (1, 1), (2, 0), (2, 1)})):
        found = with_hard(larger, svd, zeros, 8, 6, kept).hard
        assert set(zip(*(part.tolist() for part in found), strict=True)) == expected


def test_hard_windows_are_half_of_a_batch(bank) -> None:
    hard = replace(bank, hard=(torch.tensor([2]), torch.tensor([1])))
    count, generator = 400, torch.Generator().manual_seed(0)
    drawn = hard.draw(count, 8, generator).latents[:, 0]
    share = (drawn == bank.latents[2, 4]).flatten(1).all(1).float().mean()
    assert 0.5 < share < 0.67  # half, and a sixth of the others, which are drawn from two places in three clips


def test_a_run_resumes_bit_for_bit(learner, bank, tmp_path: Path) -> None:
    whole, first = learner(), learner()
    whole.train(bank)
    for _ in range(2):
        first.descend(bank, 1e-3)
    first.save(tmp_path / "state.pt")
    second, straight = learner(), learner()
    assert second.resume(tmp_path / "state.pt") and second.step == 2
    for _ in range(2):
        straight.descend(bank, 1e-3)
    for one in (second, straight):
        one.descend(bank, 5e-4)
    assert all(a.equal(b) for a, b in zip(second.masters, straight.masters, strict=True))
    assert all(a.equal(b) for a, b in zip(second.ema, straight.ema, strict=True))
    assert whole.step == 4 and not whole.masters[0].equal(straight.masters[0])


def test_a_run_keeps_to_its_time(learner, bank) -> None:
    timed = learner(steps=0, seconds=1.0)
    timed.train(bank)
    assert timed.step >= 1 and timed.elapsed == pytest.approx(1.0, abs=3.0)


def test_the_unet_holds_the_average_while_it_is_watched(learner, bank) -> None:
    trained = learner(ema=0.5)
    seen = []

    def watch(done: float) -> None:
        seen.append((done, trained.live[0].detach().clone(), trained.ema[0].clone()))

    trained.train(bank, watch=watch, watched=(0.5,))
    (done, live, average) = seen[0]
    assert done == 0.5 and live.equal(average)
    assert trained.live[0].equal(trained.masters[0]) and not live.equal(trained.masters[0])


def test_a_run_that_diverges_goes_back_at_half_the_rate(learner, bank, tmp_path: Path) -> None:
    run = learner()
    run.descend(bank, 1e-3)
    run.save(tmp_path / "state.pt")
    before = [master.clone() for master in run.masters]
    run.masters[0].fill_(float("nan"))
    run._go_back(tmp_path / "state.pt")
    assert run.slower == 0.5 and all(a.equal(b) for a, b in zip(run.masters, before, strict=True))
    with pytest.raises(FloatingPointError, match="learning rate"):
        run._go_back(None)


def test_muon_turns_every_matrix_by_about_the_same_amount(learner, bank) -> None:
    run = learner(muon=True)
    before = {name: master.clone() for name, master in zip(run.names, run.masters, strict=True)}
    run.descend(bank, 1e-3)
    seen = 0
    for name, master in zip(run.names, run.masters, strict=True):
        change = (master - before[name]).flatten(1) if master.ndim > 1 else None
        if change is None or not change.any():
            continue
        # All singular values of an update are near 1, times what makes its size AdamW's (0.2 of the rate).
        spectrum = torch.linalg.svdvals(change) / (1e-3 * 0.2 * max(change.shape) ** 0.5)
        assert spectrum.max() < 1.3, name
        seen += bool((spectrum > 0.5).all())
    assert seen > 50  # not those whose gradients have less than full rank


def test_a_run_with_muon_resumes_where_it_stopped(learner, bank, tmp_path: Path) -> None:
    whole = learner(muon=True)
    for _ in range(3):
        whole.descend(bank, 1e-3)
    first, second = learner(muon=True), learner(muon=True)
    first.descend(bank, 1e-3)
    first.save(tmp_path / "state.pt")
    assert second.resume(tmp_path / "state.pt")
    for _ in range(2):
        second.descend(bank, 1e-3)
    for a, b in zip(second.masters, whole.masters, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_errors_of_frames_come_back_in_first_frames(learner, bank) -> None:
    run = learner(recycle=1.0, levels=torch.tensor([0.5]))
    run.descend(bank, 0.0)
    assert run.recycled[: run.plan.batch].abs().sum((1, 2, 3)).min() > 0 and not run.recycled[run.plan.batch :].any()
    error = run.denoised - run.buffers["latents"]
    for clip, kept in enumerate(run.recycled[: run.plan.batch]):
        assert any(kept.equal(frame) for frame in error[clip])
    run.recycled.fill_(1.0)
    run.fill(bank)
    added = run.buffers["first"] * SCALING - run.buffers["latents"][:, 0]
    torch.testing.assert_close(added, torch.ones_like(added))

    noisy = learner(recycle=1.0, levels=torch.tensor([50.0]))
    noisy.descend(bank, 0.0)
    assert not noisy.recycled.any()  # there, errors reflect open futures


@pytest.fixture
def student(base: Path):
    from exvideo_core.diffusers import checkpoint
    from exvideo_core.post_tuning.distillation import Paths, phase_levels
    from small_model.distill import Student
    from small_model.training import Plan

    def make(target: str = "consistency", **more: object) -> Student:
        unet = checkpoint.load(base).unet.train()
        paths = Paths.of(phase_levels(2, 700.0, 1.0), 6, target)
        plan = Plan(frames=FRAMES, batch=2, rate=1e-3, levels=paths.levels, weight=torch.ones_like, warmup=1, steps=4)
        return Student(unet, [(list(unet.parameters()), 1.0)], plan, paths, guidance=1.0, decay=0.75, **more)

    return make


def test_a_student_learns_from_its_teacher_and_its_own_average(student, bank) -> None:
    run = student()
    start = [master.clone() for master in run.masters]
    run.descend(bank, 1e-3)
    first = [target.clone() for target in run.targets]
    run.descend(bank, 1e-3)
    for name, before, target, earlier, master in zip(run.names, start, run.targets, first, run.masters, strict=True):
        assert run.distillation.teacher[name].equal(before)
        torch.testing.assert_close(target, 0.75 * earlier + 0.25 * master)
        assert run.distillation.average[name].equal(target)
    assert not run.masters[0].equal(start[0])
    steps = run.buffers["steps"]
    assert set(run.buffers["sigma"].tolist()) <= set(run.distillation.paths.levels.tolist())
    assert steps[:, 0].equal(run.buffers["sigma"]) and (steps[:, 1] < steps[:, 0]).all()
    assert (run.buffers["end"] <= steps[:, 1]).all()
    run.levels = run.levels[:1]
    run.fill(bank)
    assert not run.buffers["latents"].any()  # sampling starts from pure noise


def test_a_student_of_a_perfect_teacher_has_no_error_where_a_phase_ends(student, bank) -> None:
    run = student()
    # From the last level of the first phase, the teacher's Euler step arrives at the phase's end.
    paths = run.distillation.paths
    last = int((paths.steps[:, 1] == paths.ends).nonzero()[0])
    run.levels = paths.levels[last : last + 1]
    run.fill(bank)
    run._clear()
    run._compute()
    assert run.errors.max() < 1e-6  # student and teacher are still the same


@pytest.mark.parametrize("kind", ["consistency", "progressive"])
def test_a_students_target_is_that_of_the_packs_distillation(student, bank, kind: str) -> None:
    from exvideo_core.post_tuning.distillation import with_weights

    run = student(kind)
    run.distillation.guidance = 2.0
    run.descend(bank, 1e-3)
    run.fill(bank)
    sample, steps, end = run._sample(), run.buffers["steps"], run.buffers["end"]
    noisy = sample.latents + sample.noise * sample.sigma.view(-1, 1, 1, 1, 1)
    expected = run.distillation.target(partial(with_weights, run.unet), noisy, sample, steps, end)
    torch.testing.assert_close(run._target(noisy, sample, steps, end), expected, rtol=1e-4, atol=1e-4)
    assert all(live.equal(master) for live, master in zip(run.live, run.masters, strict=True))


def test_a_student_can_have_another_unet_as_its_teacher(base: Path, student, bank) -> None:
    from exvideo_core.diffusers import checkpoint
    from small_model.distill import _teacher

    other = checkpoint.load(base).unet
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    run, own, same = student(teacher=_teacher(other)), student(), student()
    same.distillation.teacher = dict(other.named_parameters())
    targets = []
    for each in (run, own, same):
        each.fill(bank)
        sample = each._sample()
        noisy = sample.latents + sample.noise * sample.sigma.view(-1, 1, 1, 1, 1)
        targets.append(each._target(noisy, sample, each.buffers["steps"], each.buffers["end"]))
    torch.testing.assert_close(targets[0], targets[2])
    assert not torch.allclose(targets[0], targets[1], rtol=0.01)


def test_a_distillation_resumes_bit_for_bit(student, bank, tmp_path: Path) -> None:
    whole, first, second = student(), student(), student()
    for _ in range(3):
        whole.descend(bank, 1e-3)
    first.descend(bank, 1e-3)
    first.save(tmp_path / "state.pt")
    assert second.resume(tmp_path / "state.pt")
    for _ in range(2):
        second.descend(bank, 1e-3)
    for kind in ("masters", "targets", "ema"):
        assert all(a.equal(b) for a, b in zip(getattr(second, kind), getattr(whole, kind), strict=True)), kind


@pytest.mark.parametrize("part", ["positions", "convolution", "attention"])
def test_an_ablation_lacks_one_part(svd, part: str) -> None:
    from exvideo_core.method.extension import BlockWeights
    from exvideo_core.post_tuning.selection import untrained
    from small_model.extension import without

    start = untrained(svd.unet, FRAMES)
    trained = replace(start, blocks=tuple(
        BlockWeights(block.positions + 1, block.conv_weight + 1, block.conv_bias + 1,
                     {name: value + 1 for name, value in block.shared.items()}) for block in start.blocks
    ))  # fmt: skip
    changed = {"positions": "positions", "conv_weight": "convolution", "conv_bias": "convolution"}
    before = start.tensors()
    for name, value in without(trained, part, start).tensors().items():
        own = next((own for field, own in changed.items() if name.endswith(_STORED[field])), "attention")
        torch.testing.assert_close(value, before[name] + (own != part))


def test_too_few_hard_windows_are_refused(monkeypatch, capsys) -> None:
    from small_model import extension

    monkeypatch.setattr("sys.argv", ["extension", "--out", "nowhere", "--base", "nowhere", "--hard", "7"])
    with pytest.raises(SystemExit):
        extension.main()
    assert "--hard needs at least 8 windows" in capsys.readouterr().err


def test_held_out_clips_are_measured(svd) -> None:
    from small_model.held_out import HeldOut, curve

    held = HeldOut.of(svd, 2, FRAMES)
    truth = held.windows.latents

    def knows(sample: torch.Tensor, timestep: torch.Tensor, *_: object, **__: object) -> tuple[torch.Tensor]:
        """The velocity that leads to the true clips, from any noise."""
        sigma = (4 * timestep).exp().view(-1, 1, 1, 1, 1)
        spread = (1 + sigma.square()).sqrt()
        return ((sample[:, :, :4] / spread - truth[: len(sample)]) * spread / sigma,)

    assert all(row["mse"] < 1e-6 for row in curve(held, knows))
    for steps in (1, 5):
        torch.testing.assert_close(held.make(knows, steps), truth, rtol=1e-3, atol=1e-3)
    videos = [world.render(clip, FRAMES) for clip in held.clips]
    figures = held.figures(videos)
    assert figures["presence"] == 1 and figures["path_error"] < 0.003
    assert figures["exchanged"] == 0 and figures["kind"] == 1
    assert figures["right"] == np.mean([clip.heading > 0 for clip in held.clips])


def test_the_ideal_prediction_is_the_mean_of_the_futures_that_the_noise_leaves_open(svd) -> None:
    from dataclasses import replace

    from small_model.held_out import HeldOut
    from small_model.scenes import Scenes, as_read

    held = HeldOut.of(svd, 2, FRAMES)
    truth = held.windows.latents
    futures = []
    for clip in held.clips:
        for left, right in ((-1, -1), (-1, 1), (1, -1), (1, 1)):
            scene = Scenes.of([replace(clip, heading=np.array([left, right]))])
            pixels = as_read(scene.draw(scene.centers(torch.arange(FRAMES))))[0]
            with torch.no_grad():
                futures.append(svd.vae.encode(pixels).latent_dist.mode() * svd.vae.config.scaling_factor)
    futures = torch.stack(futures).unflatten(0, (2, 4))
    spread = float((futures - truth[:, None]).square().flatten(2).sum(2).max().sqrt())
    torch.testing.assert_close(held.ideal(1e-4 * spread), truth, atol=1e-5, rtol=0)
    torch.testing.assert_close(held.ideal(1e5 * spread), futures.mean(1), atol=1e-4, rtol=0)

    sigma = spread / 3
    noise = held._noise(0)
    for index in range(2):
        # Bayes' rule with a Gaussian likelihood and four futures of equal probability
        distances = [float((truth[index] + sigma * noise[index] - future).norm() ** 2) for future in futures[index]]
        odds = [np.exp(-(each - min(distances)) / (2 * sigma**2)) for each in distances]
        expected = sum(own * future for own, future in zip(odds, futures[index], strict=True)) / sum(odds)
        torch.testing.assert_close(held.ideal(sigma)[index], expected, atol=1e-3, rtol=0)
