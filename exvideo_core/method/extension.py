"""The ExVideo extension: loads, checks and saves its weights."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from ..files.output_file import begin, discard, explain_errors, finish
from ..files.safetensors_header import Header, ModelFileError, read_header
from . import positions, tensor_names
from .convolution import identity_convolution
from .noise_levels import SIGMA_MAX, SIGMA_MIN

#: Name prefixes in training checkpoints, longest first.
_PREFIXES = ("_forward_module.unet.", "unet.")
_SOURCE = "Use an ExVideo extension such as ExVideo-SVD-128f-v1 (model.fp16.safetensors)."
_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


@dataclass(frozen=True)
class FewSteps:
    """How an extension is sampled that was distilled for few steps. Stored as metadata of its file.

    Attributes:
        steps: denoising steps.
        guidance: classifier-free guidance scale to sample with.
        sampler: ComfyUI's name of the sampler.
        scheduler: ComfyUI's name of the scheduler.
        sigma_max: noise level of the first step.
        sigma_min: noise level of the last step.
    """

    steps: int
    guidance: float = 1.0
    sampler: str = "euler"
    scheduler: str = "karras"
    sigma_max: float = SIGMA_MAX
    sigma_min: float = SIGMA_MIN

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> FewSteps | None:
        """Read metadata. Returns None if there are no steps, or values that no sampler could use."""
        found = {name: metadata[key] for name, key in _FEW_STEPS.items() if key in metadata}
        try:
            numbers = {name: float(found[name]) for name in ("guidance", "sigma_max", "sigma_min") if name in found}
            names = {name: found[name] for name in ("sampler", "scheduler") if name in found}
            made = cls(int(found["steps"]), **numbers, **names)
        except (KeyError, ValueError):
            return None
        usable = made.steps >= 1 and 0 < made.sigma_min < made.sigma_max < math.inf and math.isfinite(made.guidance)
        return made if usable else None

    def metadata(self) -> dict[str, str]:
        """The metadata to store."""
        return {key: str(getattr(self, name)) for name, key in _FEW_STEPS.items()}

    def __str__(self) -> str:
        levels = f"sigma {self.sigma_max:g} to {self.sigma_min:g}"
        return f"{self.steps} steps, CFG {self.guidance:g}, {self.sampler}, {self.scheduler}, {levels}"


_FEW_STEPS = {field.name: f"exvideo.{field.name}" for field in fields(FewSteps)}


@dataclass(frozen=True)
class BlockWeights:
    """Weights of one extended temporal block of width C.

    Attributes:
        positions: one row per trained frame [F, C].
        conv_weight: over (time, height, width) [C, C, 3, 3, 3].
        conv_bias: [C].
        shared: the 30 tensors that replace the base's, by their names under the SVD transformer.
    """

    positions: torch.Tensor
    conv_weight: torch.Tensor
    conv_bias: torch.Tensor
    shared: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Extension:
    """An ExVideo extension. Its tensors are kept in memory, so it does not depend on the file.

    Attributes:
        name: file name, for messages.
        blocks: the 16 blocks, in the order of `tensor_names.SVD_TRANSFORMERS`.
        few_steps: how to sample it, if it was distilled for few steps.
    """

    name: str
    blocks: tuple[BlockWeights, ...]
    few_steps: FewSteps | None = None

    @property
    def frames(self) -> int:
        """Number of frames that the extension was trained for."""
        return self.blocks[0].positions.shape[0]

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of each block."""
        return tuple(block.conv_bias.shape[0] for block in self.blocks)

    @property
    def context_dim(self) -> int:
        """Width of the image embedding that the blocks attend to."""
        return self.blocks[0].shared["time_stack.0.attn2.to_k.weight"].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.blocks[0].positions.dtype

    @classmethod
    def from_tensors(
        cls, name: str, tensors: Mapping[str, torch.Tensor], few_steps: FewSteps | None = None
    ) -> Extension:
        """Build an extension from tensors that are named and shaped as in `tensor_names.extension_shapes`."""
        blocks = []
        for block in tensor_names.BLOCK_IDS:
            prefix = f"blocks.{block}."
            blocks.append(
                BlockWeights(
                    positions=tensors[prefix + tensor_names.POSITIONS],
                    conv_weight=tensors[prefix + tensor_names.CONV_WEIGHT],
                    conv_bias=tensors[prefix + tensor_names.CONV_BIAS],
                    shared={svd: tensors[prefix + ours] for ours, svd in tensor_names.SHARED_TENSORS.items()},
                )
            )
        return cls(name, tuple(blocks), few_steps)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Extension:
        """Load and check an extension file in fp16, bf16 or fp32, of any width and number of frames.

        Names may have the prefixes of training checkpoints (`unet.`, `_forward_module.unet.`).

        Raises:
            ModelFileError: the file is not a complete, finite ExVideo extension.
        """
        from safetensors import SafetensorError, safe_open

        if os.path.splitext(path)[1] != ".safetensors":
            raise ModelFileError(path, "is not a .safetensors file.", _SOURCE)
        header = read_header(path)
        names = _canonical_names(path, header)
        _check_layout(path, names, header)
        tensors: dict[str, torch.Tensor] = {}
        before = os.stat(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                for name, stored in names.items():
                    tensors[name] = file.get_tensor(stored).clone()  # the tensor itself is memory-mapped
        except (SafetensorError, OSError) as error:
            raise ModelFileError(path, f"cannot be read: {error}.", "Download it again.") from error
        after = os.stat(path)
        if (before.st_mtime_ns, before.st_size) != (after.st_mtime_ns, after.st_size):
            raise ModelFileError(path, "changed while it was being read.", "Run the workflow again.")
        for name, tensor in tensors.items():
            # Minimum and maximum reveal NaN and infinity without allocating a mask.
            if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
                raise ModelFileError(
                    path,
                    f"contains NaN or infinite values in {name}.",
                    "Its training diverged, or the file is corrupted. Use another file.",
                )
        return cls.from_tensors(os.path.basename(path), tensors, FewSteps.from_metadata(header.metadata))

    @classmethod
    def untrained(
        cls, shared: Sequence[Mapping[str, torch.Tensor]], widths: Sequence[int], frames: int, base_frames: int = 25
    ) -> Extension:
        """Create an extension that leaves its base unchanged: the start of post-tuning (paper section 3.2).

        Positions are the base's sinusoids, continued in ping-pong order after `base_frames`. The convolution is an
        identity, and the temporal weights are the base's.

        Args:
            shared: the base's 30 temporal weights of each of the 16 blocks, by their names under the SVD transformer.
            widths: channels of each block.
            frames: number of frames to extend to.
            base_frames: number of frames that the base was trained for.

        Raises:
            ValueError: `frames` is less than 1.
        """
        if frames < 1:
            raise ValueError(f"An extension needs at least 1 frame, not {frames}.")
        rows = positions.ping_pong(frames, base_frames)
        blocks = []
        for weights, channels in zip(shared, widths, strict=True):
            blocks.append(
                BlockWeights(
                    positions=positions.sinusoidal(rows, channels),
                    conv_weight=identity_convolution(channels),
                    conv_bias=torch.zeros(channels),
                    shared={name: tensor.detach() for name, tensor in weights.items()},
                )
            )
        return cls("untrained", tuple(blocks))

    def tensors(self, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
        """All tensors, named and shaped as in `tensor_names.extension_shapes`.

        Args:
            dtype: dtype to convert to (default: unchanged).
        """
        found: dict[str, torch.Tensor] = {}
        for block, weights in zip(tensor_names.BLOCK_IDS, self.blocks, strict=True):
            prefix = f"blocks.{block}."
            found[prefix + tensor_names.POSITIONS] = weights.positions
            found[prefix + tensor_names.CONV_WEIGHT] = weights.conv_weight
            found[prefix + tensor_names.CONV_BIAS] = weights.conv_bias
            found |= {prefix + ours: weights.shared[svd] for ours, svd in tensor_names.SHARED_TENSORS.items()}
        return {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in found.items()}

    def save(self, path: str | os.PathLike[str], dtype: torch.dtype = torch.float16) -> None:
        """Write the extension in the published format, atomically.

        Raises:
            ValueError: a value is not finite or too large for the dtype.
            OutputFileError: the file cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        tensors = self.tensors(dtype)
        for name, tensor in tensors.items():
            if not torch.isfinite(torch.stack(torch.aminmax(tensor))).all():
                raise ValueError(
                    f"Not saved: {name} contains NaN, infinite values, or values too large for {dtype}. Choose a wider "
                    "dtype."
                )
        few_steps = self.few_steps.metadata() if self.few_steps else {}
        path = Path(path)
        part = begin(path)
        try:
            with explain_errors(path):
                try:
                    save_file(tensors, part, metadata={"format": "pt", **few_steps})
                except SafetensorError as error:
                    raise _disk_error(error) from error
            finish(part, path)
        finally:
            discard(part)

    def check_fits(self, widths: Sequence[int], context_dim: int) -> None:
        """Check that the extension fits a model.

        Args:
            widths: channels of the model's 16 transformers.
            context_dim: width of the model's image embedding.

        Raises:
            ValueError: it does not.
        """
        if self.widths != tuple(widths) or self.context_dim != context_dim:
            ours, theirs = format_widths(self.widths), format_widths(widths)
            raise ValueError(
                f"The extension '{self.name}' does not fit this model: it has block widths {ours} and an image "
                f"embedding of {self.context_dim}, the model has {theirs} and {context_dim}. Load the SVD checkpoint "
                "that the extension was trained on."
            )


def _disk_error(error: Exception) -> Exception:
    """The operating system's error, which safetensors reports only as text."""
    number = re.search(r"(?:os error|code:) (\d+)", str(error))
    if number is None:
        return error
    if os.name == "nt":  # a Windows error code, from which Python derives errno
        return OSError(0, str(error), None, int(number[1]))
    return OSError(int(number[1]), str(error))


def _canonical_names(path: str | os.PathLike[str], header: Header) -> dict[str, str]:
    """Map names without prefixes to the names in the file."""
    names: dict[str, str] = {}
    for stored in header.shapes:
        name = next((stored[len(p) :] for p in _PREFIXES if stored.startswith(p)), stored)
        if name in names:
            raise ModelFileError(
                path, f"contains {name} twice, as {names[name]} and {stored}.", "Keep one of them and save it again."
            )
        names[name] = stored
    return names


def _check_layout(path: str | os.PathLike[str], names: Mapping[str, str], header: Header) -> None:
    """Check that a file holds exactly the tensors of an extension, with consistent shapes and a supported dtype."""
    shapes = {name: header.shapes[stored] for name, stored in names.items()}
    biases = [f"blocks.{block}.{tensor_names.CONV_BIAS}" for block in tensor_names.BLOCK_IDS]
    if not any(name.endswith(tensor_names.POSITIONS) for name in shapes):
        raise ModelFileError(path, f"is {guess_kind(shapes)}, not an ExVideo extension.", _SOURCE)

    def probe(name: str, dims: int, axis: int) -> int:
        shape = shapes.get(name, ())
        return shape[axis] if len(shape) == dims else 0

    widths = [probe(name, 1, 0) for name in biases]
    frames = probe(f"blocks.{tensor_names.BLOCK_IDS[0]}.{tensor_names.POSITIONS}", 2, 0)
    context_dim = probe(f"blocks.{tensor_names.BLOCK_IDS[0]}.attn2.to_k.weight", 2, 1)
    expected = tensor_names.extension_shapes(widths, context_dim, frames)
    missing = sorted(expected.keys() - shapes.keys())
    if missing:
        raise ModelFileError(
            path,
            f"is missing {_list_tensors(missing)} of an ExVideo extension.",
            "It is incomplete. Download or export it again.",
        )
    extra = sorted(shapes.keys() - expected.keys())
    if extra:
        raise ModelFileError(
            path,
            f"contains {_list_tensors(extra)} that no ExVideo extension has.",
            "Export only the extension's own tensors.",
        )
    for name, shape in expected.items():
        if shapes[name] != shape or 0 in shape:
            raise ModelFileError(
                path,
                f"has {name} with shape {list(shapes[name])}, expected {list(shape)}.",
                "It is corrupted or belongs to another model. Use another file.",
            )
        if header.dtypes[names[name]] not in _DTYPES:
            raise ModelFileError(
                path, f"stores {name} as {header.dtypes[names[name]]}.", "Use a file in fp16, bf16 or fp32."
            )


def guess_kind(shapes: Mapping[str, object]) -> str:
    """Guess from its tensor names what kind of model a file contains."""
    if any(re.match(r"(model\.)?diffusion_model\..*time_stack", name) for name in shapes):
        return "an SVD checkpoint (it belongs in models/checkpoints)"
    kinds = (
        ("model.diffusion_model.", "a Stable Diffusion checkpoint"),
        ("lora", "a LoRA"),
        ("down_blocks.", "a diffusers UNet"),
        ("first_stage_model.", "a VAE"),
    )
    return next((kind for part, kind in kinds if any(part in name for name in shapes)), "a model of another kind")


def _list_tensors(names: Sequence[str]) -> str:
    return f"the tensor {names[0]}" if len(names) == 1 else f"{len(names)} tensors ({names[0]}, ...)"


def format_widths(widths: Sequence[int]) -> str:
    """Summarize widths: '2x320, 2x640' for 320, 320, 640, 640."""
    runs: list[list[int]] = []
    for width in widths:
        if runs and runs[-1][1] == width:
            runs[-1][0] += 1
        else:
            runs.append([1, width])
    return ", ".join(f"{count}x{width}" for count, width in runs)
