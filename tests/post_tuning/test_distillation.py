"""Step distillation: its formulas written out, one step of a run, and what a run leaves."""

from __future__ import annotations

import math
import signal
import time
from functools import partial

import pytest
import torch

from exvideo_core.method.extension import Extension, FewSteps
from exvideo_core.post_tuning import distillation
from exvideo_core.post_tuning.loss import sigma_ramp
from exvideo_core.post_tuning.samples import Sample
from training_run import Run

SIZES = {"objective": "distill", "distill_steps": 3, "distill_teacher_steps": 10, "distill_guidance": 1.5}


def test_phases_begin_at_karras_levels() -> None:
    levels = distillation.phase_levels(4, 700.0, 1.0).tolist()
    roots = [level ** (1 / 7) for level in levels[:-1]]
    assert (levels[0], levels[3], levels[4]) == (pytest.approx(700), pytest.approx(1), 0)
    steps = [a - b for a, b in zip(roots[:-1], roots[1:], strict=True)]
    assert steps == pytest.approx([(700 ** (1 / 7) - 1) / 3] * 3, rel=1e-5)


@pytest.mark.parametrize("highest", [700.0, 70.0])
def test_every_level_of_the_teacher_belongs_to_the_phase_below_it(highest: float) -> None:
    phases = distillation.phase_levels(4, highest, 1.0)
    paths = distillation.Paths.of(phases, 12, "consistency")
    bounds = phases.tolist()
    expected = sorted({*bounds, *(level for level in sigma_ramp(12).tolist() if level < highest)}, reverse=True)
    assert [*paths.levels.tolist(), 0.0] == expected
    for steps, lower, end in zip(paths.steps.tolist(), expected[1:], paths.ends.tolist(), strict=True):
        assert end == max(bound for bound in bounds if bound < steps[0])
        assert steps[1] == lower and end <= lower < steps[0]


def test_a_progressive_teacher_goes_through_whole_phases() -> None:
    phases = distillation.phase_levels(3, 70.0, 3.0)
    paths = distillation.Paths.of(phases, 10, "progressive")
    assert paths.levels.equal(phases[:-1]) and paths.ends.equal(phases[1:]) and paths.steps.shape == (3, 5)
    assert paths.steps[:, 0].equal(phases[:-1]) and paths.steps[:, -1].equal(phases[1:])
    for steps, low in zip(paths.steps.tolist(), [*phases[1:-1].tolist(), 0.002], strict=True):
        roots = [level ** (1 / 7) for level in [*steps[:-1], low]]
        assert [a - b for a, b in zip(roots[:-1], roots[1:], strict=True)] == pytest.approx(
            [(roots[0] - roots[-1]) / 4] * 4, rel=1e-4
        )


@pytest.mark.parametrize("arrives", [False, True])
@pytest.mark.parametrize("hops", [1, 2])
def test_the_target_is_the_formula(arrives: bool, hops: int) -> None:
    torch.manual_seed(0)
    noisy = torch.randn(2, 3, 4, 2, 2)
    steps = torch.tensor([[8.0, 6.0, 4.0], [2.0, 1.5, 1.0]])[:, [0, 2] if hops == 1 else [0, 1, 2]]
    end = steps[:, -1] if arrives else torch.tensor([0.5, 0.0])

    def teacher(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return 0.3 * x + level.view(-1, 1, 1, 1, 1)

    def average(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return 0.2 * x - level.view(-1, 1, 1, 1, 1)

    found = distillation.student_target(teacher, average, noisy, steps, end)
    if arrives:
        assert found.equal(distillation.student_target(teacher, None, noisy, steps, end))
    for clip in range(2):
        levels, s = steps[clip].tolist(), float(end[clip])
        x = noisy[clip]
        for sigma, lower in zip(levels[:-1], levels[1:], strict=True):
            clean = 0.3 * x + sigma
            x = clean + (x - clean) * lower / sigma
        if not arrives:
            predicted = 0.2 * x - levels[-1]
            x = predicted + (x - predicted) * s / levels[-1]
        # One Euler step of the student with the target as its prediction ends at the phase's end.
        landed = found[clip] + (noisy[clip] - found[clip]) * s / levels[0]
        torch.testing.assert_close(landed, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("target", ["consistency", "progressive"])
@pytest.mark.parametrize("count", [1, 3])
def test_what_solves_the_path_exactly_is_its_own_target(count: int, target: str) -> None:
    """Data of a unit Gaussian: D = x / (1 + sigma^2), and along the path x is proportional to sqrt(1 + sigma^2)."""
    paths = distillation.Paths.of(distillation.phase_levels(count, 700.0, 1.0), 4000, target)

    def teacher(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        return x / (1 + level.view(-1, 1, 1, 1, 1).square())

    def exact(x: torch.Tensor, level: torch.Tensor) -> torch.Tensor:
        """D with which one Euler step reaches the end of a level's phase."""
        found = []
        for own, sigma in zip(x, level.double().tolist(), strict=True):
            end = max(e for e in paths.ends.double().tolist() if e < sigma)
            share = end / sigma
            found.append(own * (math.sqrt((1 + end**2) / (1 + sigma**2)) - share) / (1 - share))
        return torch.stack(found)

    places = torch.tensor([10, 700, 1500, 2500, 3500] if target == "consistency" else [0, 0, count - 1])
    sigma = paths.levels[places]
    spread = (1 + sigma.square()).sqrt().view(-1, 1, 1, 1, 1)
    noisy = torch.randn(len(places), 1, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * spread
    average = exact if target == "consistency" else None
    found = distillation.student_target(teacher, average, noisy, paths.steps[places], paths.ends[places])
    torch.testing.assert_close(found, exact(noisy, sigma), rtol=1e-2, atol=1e-2)


def test_the_loss_is_the_formula() -> None:
    torch.manual_seed(0)
    ours, target = torch.randn(2, 2, 4, 2, 2), torch.randn(2, 2, 4, 2, 2)
    sigma, end = torch.tensor([8.0, 2.0]), torch.tensor([0.5, 0.0])
    error, loss = distillation.distillation_loss(ours, target, sigma, end)
    squares = [float((ours[i] - target[i]).square().mean()) * (1 - float(end[i] / sigma[i])) ** 2 for i in range(2)]
    weights = [math.sqrt(1 + s * s) / s for s in (8.0, 2.0)]
    assert float(error) == pytest.approx(sum(squares) / 2, rel=1e-5)
    assert float(loss) == pytest.approx(sum(w * e for w, e in zip(weights, squares, strict=True)) / 2, rel=1e-5)


@pytest.fixture(scope="module")
def teacher(base, videos, tmp_path_factory) -> Run:
    """A short run of the published objective: the extension to distil."""
    done = Run(base, videos, tmp_path_factory.mktemp("teacher"), steps=2)
    done.finish()
    return done


@pytest.fixture
def distil(teacher, run):
    def make(name: str = "student", **settings: object) -> Run:
        return run(name, init=teacher.out / "extension.safetensors", **{**SIZES, **settings})

    return make


@pytest.mark.parametrize("kind", ["consistency", "progressive"])
def test_one_step_of_a_run_is_the_formulas(base, videos, teacher, distil, kind: str) -> None:
    from exvideo_core.diffusers import checkpoint, patch
    from exvideo_core.post_tuning import config
    from exvideo_core.post_tuning.samples import Encoder, Samples
    from exvideo_core.post_tuning.selection import select
    from exvideo_core.post_tuning.videos import scan

    student = distil(steps=1, distill_target=kind)
    student.finish()
    settings = config.parse(student.arguments[2:])
    svd = checkpoint.load(base)
    folder = scan(videos, settings.span, 64, 64)
    sample = Samples(folder.videos, settings, Encoder(svd.vae, svd.image_encoder), None)[0]
    unet = svd.unet.train()
    start = Extension.load(teacher.out / "extension.safetensors")
    patch.apply(unet, start)
    trained = [parameter for group in select(unet, True, True, True).values() for parameter in group]

    def call(x: torch.Tensor, sigma: float, nothing: bool = False) -> torch.Tensor:
        """D of EDM with SVD's v-prediction, written out."""
        first, embedding = (torch.zeros_like(v) if nothing else v for v in (sample.first, sample.embedding))
        scale = math.sqrt(1 + sigma * sigma)
        given = torch.cat([x / scale, first[:, None].expand(-1, x.shape[1], -1, -1, -1)], dim=2)
        velocity = unet(given, torch.tensor([0.25 * math.log(sigma)]), embedding, sample.ids, return_dict=False)[0]
        return x / scale**2 - velocity * sigma / scale

    paths = distillation.Paths.of(distillation.phase_levels(3, 700.0, 1.0), 10, kind)
    levels = paths.levels.tolist()
    place = min(range(len(levels)), key=lambda i: abs(math.log(levels[i] / float(sample.sigma))))
    sigma, end = levels[place], float(paths.ends[place])
    noisy = sample.latents * (place > 0) + sigma * sample.noise
    with torch.no_grad():
        left, path = noisy, paths.steps[place].tolist()
        for level, lower in zip(path[:-1], path[1:], strict=True):
            negative = call(left, level, nothing=True)
            clean = negative + 1.5 * (call(left, level) - negative)
            left = clean + (left - clean) * lower / level
        if path[-1] > end:
            predicted = call(left, path[-1])  # the target network is the student before its first step
            left = predicted + (left - predicted) * end / path[-1]
        target = (left - noisy * end / sigma) / (1 - end / sigma)
    error = (call(noisy, sigma) - target).square().mean() * (1 - end / sigma) ** 2
    loss = error * math.sqrt(1 + sigma * sigma) / sigma
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay, eps=1e-8)
    loss.backward()
    optimizer.step()

    found = student.checkpoint()
    names = {name: value for name, value in unet.named_parameters() if name in found}
    before = {id(parameter): name for name, parameter in names.items()}
    assert len(before) == len(trained) == len(found)
    with torch.no_grad():
        moved = sum(float((names[name] - value).square().sum()) for name, value in patched(base, start).items())
        apart = sum(float((names[name] - value).square().sum()) for name, value in found.items())
    assert moved > 0 and math.sqrt(apart / moved) < 0.02


def patched(base, extension: Extension) -> dict[str, torch.Tensor]:
    """An extension's weights under their names in the UNet."""
    from exvideo_core.diffusers import checkpoint, patch

    unet = checkpoint.load(base).unet
    patch.apply(unet, extension)
    return {name: value for name, value in unet.state_dict().items() if name in patch.EXTENSION_PARAMETERS}


def test_the_file_says_how_to_sample_it_and_the_teacher_stays(teacher, distil) -> None:
    before = (teacher.out / "extension.safetensors").read_bytes()
    student = distil()
    student.finish()
    made = Extension.load(student.out / "extension.safetensors")
    assert made.few_steps == FewSteps(3, 1.0, "euler", "karras", 700.0, 1.0)
    assert Extension.load(teacher.out / "extension.safetensors").few_steps is None
    assert (teacher.out / "extension.safetensors").read_bytes() == before


def test_a_killed_run_ends_with_the_same_weights(distil) -> None:
    whole, again = distil("whole", save_every=1), distil("again", save_every=1)
    whole.finish()
    process = again.start(quiet=True)
    deadline = time.monotonic() + 300
    while not list((again.out / "checkpoints").glob("step-????????")) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    again.finish()
    first, second = whole.checkpoint(), again.checkpoint()
    assert first.keys() == second.keys() and all(first[name].equal(second[name]) for name in first)


def test_teacher_and_target_network_predict_with_their_own_weights() -> None:
    class Unet(torch.nn.Module):
        """Velocity: the noisy latents times a weight, plus the first frame."""

        def __init__(self) -> None:
            super().__init__()
            self.gain = torch.nn.Parameter(torch.tensor(9.0))

        def forward(self, sample: torch.Tensor, *_: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
            return (self.gain * sample[:, :, :4] + sample[:, :, 4:],)

    torch.manual_seed(0)
    shape, sigma, lower, end = (1, 2, 4, 2, 2), 8.0, 4.0, 0.5
    noisy, first = torch.randn(shape), torch.randn(1, 4, 2, 2)
    sample = Sample(
        latents=torch.zeros(shape), noise=noisy, sigma=torch.tensor([sigma]), first=first,
        embedding=torch.zeros(1, 1, 3), ids=torch.zeros(1, 3),
    )  # fmt: skip
    paths = distillation.Paths.of(distillation.phase_levels(2, 700.0, 1.0), 10, "consistency")
    found = distillation.Distillation({"gain": torch.tensor(0.3)}, paths, guidance=2.0, decay=0.5)
    found.update({"gain": torch.tensor(0.7)})  # the target network's weight becomes 0.5
    unet = Unet()
    steps = torch.tensor([[sigma, lower]])
    target = found.target(partial(distillation.with_weights, unet), noisy, sample, steps, torch.tensor([end]))

    def clean(x: torch.Tensor, level: float, gain: float, condition: torch.Tensor) -> torch.Tensor:
        spread = math.sqrt(level**2 + 1)
        return x / spread**2 - (gain * x / spread + condition) * level / spread

    negative, positive = clean(noisy, sigma, 0.3, 0 * first[:, None]), clean(noisy, sigma, 0.3, first[:, None])
    guided = negative + 2 * (positive - negative)
    stepped = guided + (noisy - guided) * lower / sigma
    predicted = clean(stepped, lower, 0.5, first[:, None])
    left = predicted + (stepped - predicted) * end / lower
    torch.testing.assert_close(target, (left - noisy * end / sigma) / (1 - end / sigma), rtol=1e-4, atol=1e-5)
    assert unet.gain == 9


def test_clips_move_to_the_teachers_levels_and_the_highest_is_pure_noise() -> None:
    phases = distillation.phase_levels(2, 50.0, 2.0)
    made = distillation.Distillation({}, distillation.Paths.of(phases, 4, "progressive"), 1.0, 0.5)
    latents = torch.randn(3, 2, 4, 2, 2)
    sample = Sample(
        latents=latents, noise=latents, sigma=torch.tensor([90.0, 3.0, 0.1]), first=latents[:, 0],
        embedding=torch.zeros(3, 1, 3), ids=torch.zeros(3, 3),
    )  # fmt: skip
    placed, steps, ends = made.place(sample)
    assert placed.sigma.equal(phases[[0, 1, 1]]) and steps[:, 0].equal(placed.sigma) and ends.equal(phases[[1, 2, 2]])
    # Sampling starts from pure noise.
    assert not placed.latents[0].any() and placed.latents[1:].equal(latents[1:]) and placed.noise.equal(latents)


def test_the_target_network_follows_the_student() -> None:
    weights = {"a": torch.zeros(2)}
    paths = distillation.Paths.of(distillation.phase_levels(2, 700.0, 1.0), 5, "consistency")
    made = distillation.Distillation(weights, paths, 1.0, 0.75)
    made.update({"a": torch.ones(2)})
    made.update({"a": torch.ones(2)})
    assert made.average["a"].tolist() == [0.4375] * 2 and made.teacher["a"].tolist() == [0, 0]
    other = distillation.Distillation(weights, paths, 1.0, 0.75)
    other.load_state_dict(made.state_dict())
    assert other.average["a"].equal(made.average["a"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"init": ""}, "Distillation starts from a finished extension"), ({"recycle": 0.5}, "recycle is for objective"),
     ({"distill_steps": 0}, "distill_steps is 0"), ({"distill_sigma_min": 0.0}, "distill_sigma_min is 0.0"),
     ({"distill_sigma_max": 0.5}, r"below distill_sigma_max \(0.5\)"),
     ({"distill_decay": 1.0}, "distill_decay is 1.0")],
)  # fmt: skip
def test_settings_that_do_not_go_together(changes, message) -> None:
    from exvideo_core.post_tuning.config import Config, ConfigError

    with pytest.raises(ConfigError, match=message):
        Config(**{"base": "b", "data": "d", "out": "o", "init": "e", "objective": "distill", **changes}).check()
