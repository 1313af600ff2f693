"""The training loop, for a CPU, a GPU, or several of them through accelerate."""

from __future__ import annotations

import logging
import math
import signal
import threading
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration

from ..diffusers import checkpoint, patch
from ..method.extension import Extension, FewSteps
from . import state
from .config import Config, ConfigError
from .distillation import Distillation, Paths, distillation_loss, phase_levels, with_weights
from .loss import denoise, post_tuning_loss
from .recycling import ErrorBank
from .report import Report
from .samples import Encoder, Sample, Samples, fill_cache
from .selection import select, untrained
from .videos import Folder, Video, scan

_log = logging.getLogger(__name__)


class StopSignal:
    """Makes the first SIGINT or SIGTERM stop the run after the current step; a second one has its usual effect.

    Args:
        enabled: whether to install signal handlers.
    """

    def __init__(self, enabled: bool) -> None:
        self.received = False
        self._handlers: dict[int, object] = {}
        if enabled and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: object) -> None:  # noqa: ARG002 - a signal handler's arguments
        self.received = True
        _log.warning("Stopping after this step and saving a checkpoint.")
        self.restore()

    def restore(self) -> None:
        """Restore the previous signal handlers."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._handlers.clear()


def train(config: Config) -> Path | None:
    """Post-tune an extension.

    Returns:
        Path of the extension, or None if the run was stopped before its last step. Another call resumes it.

    Raises:
        ConfigError: settings or training videos cannot be used.
        ModelFileError: the base model or the initial extension cannot be used.
    """
    out = Path(config.out)
    folder = scan(Path(config.data), config.span, config.width, config.height)
    accelerator = Accelerator(
        mixed_precision=config.mixed_precision,
        gradient_accumulation_steps=config.accumulation,
        project_config=ProjectConfiguration(project_dir=str(out), automatic_checkpoint_naming=False),
    )
    if accelerator.device.type == "cpu" and config.mixed_precision == "fp16":
        accelerator.print("fp16 is slow on a CPU and saves no memory: use --mixed-precision no or bf16.")
    svd = checkpoint.load(config.base)
    encoder = Encoder(
        svd.vae.requires_grad_(False).to(accelerator.device),
        svd.image_encoder.requires_grad_(False).to(accelerator.device),
    )
    samples = _prepare_samples(accelerator, folder, config, encoder, config.cache_path)
    if config.cache and not config.sample_every:
        encoder.vae.cpu()
        encoder.image_encoder.cpu()

    unet = svd.unet.train()
    patch.apply(unet, Extension.load(config.init) if config.init else untrained(unet, config.frames))
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    groups = select(unet, config.train_positions, config.train_convolution, config.train_attention)
    _cast_frozen(accelerator, unet, config)
    multiples = {"positions": config.positions_rate}
    optimizer = _optimizer(
        config, [{"params": group, "multiple": multiples.get(part, 1.0)} for part, group in groups.items()]
    )
    unet, optimizer = accelerator.prepare(unet, optimizer)
    state.keep_trained_only(accelerator)
    bank = None
    if config.recycle:
        scaling = svd.vae.config.scaling_factor
        bank = ErrorBank(config.recycle_bank, config.recycle, config.recycle_highest, scaling, config.seed)
        accelerator.register_for_checkpointing(bank)

    distillation = _distillation(accelerator, unet, config) if config.objective == "distill" else None

    progress = state.Progress(ema=state.MovingAverage(config.ema))
    checkpoints = out / "checkpoints"
    if accelerator.is_main_process:
        state.clean(checkpoints)
    accelerator.wait_for_everyone()
    state.resume(accelerator, checkpoints, progress, config)

    stop = StopSignal(enabled=accelerator.num_processes == 1)
    report = Report(out, config, progress.step) if accelerator.is_main_process else None
    try:
        while progress.step < config.steps and not stop.received:
            error, loss, norm = _step(accelerator, unet, optimizer, samples, bank, distillation, progress.step, config)
            progress.step += 1
            last = progress.step == config.steps
            if progress.step % config.ema_every == 0:
                progress.ema.update(_trained(accelerator, unet))
            if report is not None:
                rate = learning_rate(progress.step - 1, config)
                report.add(progress.step, error=error, loss=loss, gradient_norm=norm, learning_rate=rate)
            if progress.step % config.save_every == 0 or last or stop.received:
                state.save(accelerator, checkpoints, progress, config)
                if not last:  # the last step exports below
                    _export(accelerator, unet, progress, out, config)
            if report is not None and config.sample_every and progress.step % config.sample_every == 0:
                report.sample(progress.step, svd, samples.videos[0])
                unet.train()
            if config.sample_every:
                accelerator.wait_for_everyone()
    finally:
        stop.restore()
        if report is not None:
            report.close()
    if progress.step < config.steps:
        return None
    return _export(accelerator, unet, progress, out, config)


def _prepare_samples(
    accelerator: Accelerator, folder: Folder, config: Config, encoder: Encoder, cache: Path | None
) -> Samples:
    from tqdm import tqdm

    if cache is None:
        return Samples(folder.videos, config, encoder, None)
    share = (accelerator.process_index, accelerator.num_processes)
    broken: set[Path] = set()
    count = len(folder.videos[share[0] :: share[1]])
    bar = tqdm(total=count, desc="encoding", unit="video", disable=not accelerator.is_main_process)
    for video, error in fill_cache(cache, folder.videos, config, encoder, share):
        if error:
            broken.add(video.path)
            _log.warning("Skipped: %s", error)
        bar.update()
    bar.close()
    accelerator.wait_for_everyone()
    usable: tuple[Video, ...] = folder.videos
    if accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        broken = set(gather_object(sorted(broken)))
    usable = tuple(video for video in usable if video.path not in broken)
    if accelerator.is_main_process:
        _list_skipped(Path(config.out), folder, broken)
    if not usable:
        raise ConfigError(f"data: none of the {len(folder.videos)} videos in {config.data} can be decoded.")
    return Samples(usable, config, encoder, cache)


def _list_skipped(out: Path, folder: Folder, broken: set[Path]) -> None:
    lines = [f"{path}\t{reason}" for path, reason in folder.skipped]
    lines += [f"{path}\tcannot be decoded completely" for path in sorted(broken)]
    out.mkdir(parents=True, exist_ok=True)
    (out / "skipped.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    _log.info(
        "%d usable videos, %d skipped (see %s).", len(folder.videos) - len(broken), len(lines), out / "skipped.txt"
    )


def _cast_frozen(accelerator: Accelerator, unet: torch.nn.Module, config: Config) -> None:
    """Cast frozen weights to the dtype of the computation, which saves memory.

    Not when sharded, which requires a single dtype, nor on CPUs, whose kernels do not mix dtypes.
    """
    sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
    if config.mixed_precision == "no" or sharded or accelerator.device.type != "cuda":
        return
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[config.mixed_precision]
    for parameter in unet.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)


def _optimizer(config: Config, groups: list[dict[str, object]]) -> torch.optim.Optimizer:
    groups = [group for group in groups if group["params"]]
    settings = {"lr": config.learning_rate, "weight_decay": config.weight_decay, "eps": config.adam_epsilon}
    if config.eight_bit_adam:
        try:
            import bitsandbytes
        except ImportError as error:
            raise ConfigError(
                "eight_bit_adam needs bitsandbytes. Run pip install bitsandbytes, or turn it off."
            ) from error
        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return torch.optim.AdamW(groups, **settings)


def learning_rate(step: int, config: Config) -> float:
    """Learning rate after `step` steps: linear warm-up, then constant or decaying to 0 with a half cosine."""
    rate = config.learning_rate
    if step < config.warmup:
        return rate * (step + 1) / config.warmup
    if config.schedule == "cosine":
        share = (step - config.warmup) / max(config.steps - config.warmup, 1)
        return rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
    return rate


def _step(
    accelerator: Accelerator,
    unet: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    samples: Samples,
    bank: ErrorBank | None,
    distillation: Distillation | None,
    step: int,
    config: Config,
) -> tuple[float, float, float]:
    """Run one optimizer step.

    Samples are numbered consecutively, so that n processes that accumulate k batches each see the same samples as one
    process that accumulates n k batches.

    Returns:
        (mean error, mean loss, gradient norm).
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, config) * group["multiple"]
    errors = torch.zeros(2, device=accelerator.device)
    norm = 0.0
    for micro in range(config.accumulation):
        index = (step * config.accumulation + micro) * accelerator.num_processes + accelerator.process_index
        clips = range(index * config.batch, (index + 1) * config.batch)
        sample = Sample.batch([samples[clip] for clip in clips]).to(accelerator.device)
        if bank is not None:
            sample = bank.add_errors(sample, clips)
        if distillation is not None:
            sample, steps, end = distillation.place(sample)
        with accelerator.accumulate(unet):
            noisy = sample.latents + sample.noise * sample.sigma.view(-1, 1, 1, 1, 1)
            with accelerator.autocast():
                denoised = denoise(unet, noisy, sample.sigma, sample.first, sample.embedding, sample.ids)
                if distillation is not None:
                    other = partial(with_weights, accelerator.unwrap_model(unet))
                    target = distillation.target(other, noisy, sample, steps, end)
            if bank is not None:
                bank.add(denoised, sample, clips)
            if distillation is not None:
                error, loss = distillation_loss(denoised, target, sample.sigma, end)
            else:
                error, loss = post_tuning_loss(denoised, sample.latents, sample.sigma, config.contrast)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
                limit = config.clip_gradients or math.inf
                norm = float(accelerator.clip_grad_norm_(trained, limit))
            optimizer.step()
            optimizer.zero_grad()
        errors += torch.stack([error.detach(), loss.detach()]) / config.accumulation
    if distillation is not None:
        distillation.update(_trained(accelerator, unet))
    error, loss = accelerator.reduce(errors, "mean").tolist()
    return error, loss, norm


def _distillation(accelerator: Accelerator, unet: torch.nn.Module, config: Config) -> Distillation:
    """Teacher and target network of the extension that the run starts from.

    Raises:
        ConfigError: training is sharded.
    """
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        raise ConfigError("objective distill cannot be sharded. Use several GPUs without FSDP and DeepSpeed.")
    phases = phase_levels(config.distill_steps, config.distill_sigma_max, config.distill_sigma_min)
    paths = Paths.of(phases, config.distill_teacher_steps, config.distill_target)
    weights = _trained(accelerator, unet)
    distillation = Distillation(weights, paths, config.distill_guidance, config.distill_decay)
    accelerator.register_for_checkpointing(distillation)
    return distillation


def _trained(accelerator: Accelerator, unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The extension's weights by name, gathered on the main process if they are sharded."""
    if accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        state_dict = accelerator.get_state_dict(unet) or {}  # empty except on the main process
    else:
        state_dict = accelerator.unwrap_model(unet).state_dict()
    return {name: value for name, value in state_dict.items() if name in patch.EXTENSION_PARAMETERS}


def _few_steps(config: Config) -> FewSteps | None:
    """How to sample the resulting extension, if it is distilled."""
    if config.objective != "distill":
        return None
    return FewSteps(config.distill_steps, sigma_max=config.distill_sigma_max, sigma_min=config.distill_sigma_min)


def _export(
    accelerator: Accelerator, unet: torch.nn.Module, progress: state.Progress, out: Path, config: Config
) -> Path:
    """Save the moving average, or the current weights before its first update, as an extension."""
    weights = progress.ema.values or _trained(accelerator, unet)
    path = out / "extension.safetensors"
    if accelerator.is_main_process:
        patch.collect(accelerator.unwrap_model(unet), weights, _few_steps(config)).save(path)
    accelerator.wait_for_everyone()
    return path
