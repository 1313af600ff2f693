"""Whole runs of the command line: what they train, and that nothing that interrupts them changes the result."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import time

import pytest
import torch

from exvideo_core.method.extension import Extension
from training_run import Run

KILLS = 20 if "EXVIDEO_EVERY_TEST" in os.environ else 4
STEPS = 24


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def relative_distance(ours: Run, theirs: Run, begun: Run) -> float:
    """How far two runs ended from each other, of the way that they went.

    AdamW divides by the gradient's size: where that is rounding alone, so is the step's sign.
    """
    a, b, start = ours.checkpoint(), theirs.checkpoint(), begun.checkpoint()
    apart = sum((a[name] - b[name]).square().sum() for name in start).sqrt()
    moved = sum((a[name] - start[name]).square().sum() for name in start).sqrt()
    print(f"apart {apart:.2e}, moved {moved:.2e}")
    return (apart / moved).item()


@pytest.fixture(scope="module")
def undisturbed(base, videos, tmp_path_factory):
    done = Run(base, videos, tmp_path_factory.mktemp("undisturbed"), steps=STEPS, save_every=1, keep=2,
               sample_every=STEPS, sample_steps=2)  # fmt: skip
    done.text = done.finish()
    return done


@pytest.fixture(scope="module")
def start(base, videos, tmp_path_factory):
    """The weights that runs start from."""
    begun = Run(base, videos, tmp_path_factory.mktemp("start"), steps=1, learning_rate=0.0)
    begun.finish()
    return begun


def test_a_run_leaves_an_extension_figures_and_a_sample(undisturbed) -> None:
    extension = Extension.load(undisturbed.out / "extension.safetensors")
    assert extension.frames == 6 and extension.dtype == torch.float16
    with (undisturbed.out / "figures.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["step"]) for row in rows] == list(range(1, STEPS + 1))
    assert all(float(row["loss"]) > 0 and float(row["gradient_norm"]) > 0 for row in rows)
    assert (undisturbed.out / "samples" / "step-00000024.mp4").stat().st_size > 500
    assert (undisturbed.out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert any((undisturbed.out / "tensorboard").iterdir())
    assert len(list((undisturbed.out / "checkpoints").iterdir())) == 2
    assert "Finished" in undisturbed.text


def test_killed_again_and_again_it_ends_with_the_same_weights(run, undisturbed) -> None:
    """SIGKILL at random moments: every other time while a checkpoint is being written, else soon after one."""
    again = run(steps=STEPS, save_every=1, keep=2, sample_every=STEPS, sample_steps=2)
    checkpoints = again.out / "checkpoints"
    moments = random.Random(0)
    stood_at = []
    for kill in range(KILLS):
        process = again.start(quiet=True)
        before = set(checkpoints.glob("step-????????"))
        limit = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < limit:
            if kill % 2 == 0 and list(checkpoints.glob("*.part")):
                time.sleep(moments.uniform(0, 0.05))
                break
            if kill % 2 and set(checkpoints.glob("step-????????")) - before:
                time.sleep(moments.uniform(0, 0.5))
                break
            time.sleep(0.002)
        assert process.poll() is None, f"ended by itself ({process.returncode}) before kill {kill + 1}"
        process.send_signal(signal.SIGKILL)
        process.wait()
        stood_at.append(max((path.name for path in checkpoints.glob("step-????????")), default="start"))
    again.finish()
    print(f"{KILLS} kills, at {stood_at}")
    assert same(again.checkpoint(), undisturbed.checkpoint())
    assert same(again.weights(), undisturbed.weights())
    assert not list(checkpoints.glob("*.part"))


def test_a_stopped_run_saves_first_and_goes_on(run) -> None:
    whole, stopped = run("whole"), run("stopped", save_every=1000)
    whole.finish()
    process = stopped.start()
    table = stopped.out / "figures.csv"
    while not table.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "to resume" in text, text[-2000:]
    (saved,) = (path.name for path in (stopped.out / "checkpoints").iterdir())
    assert "step-00000001" <= saved < "step-00000006"
    stopped.finish()
    assert same(stopped.checkpoint(), whole.checkpoint())


@pytest.mark.parametrize(("epsilon", "limit"), [(1.0, 1e-4), (1e-8, 0.01)])
def test_two_processes_equal_one_of_twice_the_accumulation(run, start, epsilon, limit) -> None:
    """The gradient is summed in another order. AdamW's usual epsilon makes a step of full size of a gradient that is
    nothing but rounding; a large one leaves the step proportional to the gradient, and rounding is rounding.
    """
    settings = {"adam_epsilon": epsilon, "learning_rate": max(epsilon, 1e-3), "weight_decay": 0.0}
    one, two = run("one", accumulation=2, **settings), run("two", **settings)
    one.finish()
    two.finish(processes=2)
    distance = relative_distance(one, two, start)
    print(f"epsilon {epsilon}: {distance:.1e} of the way")
    assert distance < limit


def test_a_batch_equals_as_much_accumulation(run, start) -> None:
    settings = {"adam_epsilon": 1.0, "learning_rate": 1.0, "weight_decay": 0.0, "noise": "lognormal", "steps": 2}
    at_once, in_turn = run("at-once", batch=2, **settings), run("in-turn", accumulation=2, **settings)
    at_once.finish()
    in_turn.finish()
    assert relative_distance(at_once, in_turn, start) < 5e-4


def test_a_run_with_recycled_errors_resumes_bit_for_bit(run) -> None:
    settings = {"recycle": 0.5, "recycle_highest": 700.0, "batch": 2}
    whole, plain = run("whole", **settings), run("plain", batch=2)
    whole.finish()
    plain.finish()
    run("resumed", steps=3, **settings).finish()
    resumed = run("resumed", **settings)
    resumed.finish()
    assert same(resumed.checkpoint(), whole.checkpoint())
    assert not same(plain.checkpoint(), whole.checkpoint())


@pytest.mark.parametrize(
    ("off", "kept"),
    [
        ("train_positions", ("positional_embedding.embeddings",)),
        ("train_convolution", ("positional_conv.weight", "positional_conv.bias")),
        ("train_attention", ("attn1.to_q.weight", "norm_out.bias", "positional_embedding_proj.0.weight")),
    ],
)
def test_what_is_switched_off_stays(run, start, off, kept) -> None:
    trained = run("trained", steps=2, **{off: False})
    trained.finish()
    after, before = trained.weights(), start.weights()
    frozen = [name for name in after if name.split(".", 2)[2] in kept]
    assert len(frozen) == 16 * len(kept)
    assert all(after[name].equal(before[name]) for name in frozen)
    assert sum(not after[name].equal(before[name]) for name in after) >= 40


def test_the_moving_average_is_the_formula(run) -> None:
    """After updates at steps 2 and 4: 0.9 w2 + 0.1 w4, with w2 and w4 from the checkpoints of those steps."""
    from safetensors.torch import load_file

    done = run(steps=4, save_every=2, keep=2)
    done.finish()
    early, late = (load_file(path / "trained.safetensors") for path in sorted((done.out / "checkpoints").iterdir()))
    average = load_file(done.out / "checkpoints" / "step-00000004" / "ema.safetensors")
    for name in early:
        torch.testing.assert_close(average[name], 0.9 * early[name] + 0.1 * late[name], rtol=1e-6, atol=1e-7)


def test_without_a_cache_it_trains_the_same(run, start) -> None:
    cached, direct = run("cached", steps=2), run("direct", steps=2, cache=False)
    cached.finish()
    direct.finish()
    # The VAE encodes in other batches then, which rounds differently.
    assert relative_distance(cached, direct, start) < 0.05


def test_changed_settings_are_refused_on_resume(run) -> None:
    run("one", steps=2).finish()
    process = run("one", steps=4, learning_rate=5e-4).start()
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 2 and "learning_rate 0.001 -> 0.0005" in text


def test_a_checkpoint_from_before_a_setting_existed_resumes_with_its_default(run) -> None:
    older = run("older", steps=2)
    older.finish()
    (path,) = (older.out / "checkpoints").glob("step-00000002/progress.json")
    stored = json.loads(path.read_text())
    del stored["settings"]["noise"]
    path.write_text(json.dumps(stored))
    text, _ = run("older", steps=4, noise="interval").start().communicate(timeout=120)
    assert "noise 'ramp' -> 'interval'" in text
    run("older", steps=4).finish()


def test_gradient_checkpointing_changes_memory_only(run, start) -> None:
    on, off = run("on", steps=2), run("off", steps=2, gradient_checkpointing=False)
    on.finish()
    off.finish()
    assert relative_distance(on, off, start) < 0.01
