"""Post-tuning by its command line, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

PACK = Path(__file__).resolve().parents[1]
FRAMES = 6


class Run:
    """A run of the command line, in a process of its own."""

    def __init__(self, base: Path, videos: Path, out: Path, **settings: object) -> None:
        self.out = out
        given = {
            "base": base, "data": videos, "out": out, "frames": FRAMES, "width": 64, "height": 64, "steps": 6,
            "save_every": 2, "ema_every": 2, "log_every": 1, "learning_rate": 1e-3, "mixed_precision": "no",
        } | settings  # fmt: skip
        self.arguments = ["-m", "exvideo_core.post_tuning"]
        for name, value in given.items():
            option = f"--{name.replace('_', '-')}"
            if isinstance(value, bool):
                self.arguments.append(option if value else option.replace("--", "--no-", 1))
            else:
                self.arguments += [option, str(value)]

    def start(self, processes: int = 1, quiet: bool = False) -> subprocess.Popen[str]:
        environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(PACK)}
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command = [sys.executable, *(launcher if processes > 1 else []), *self.arguments]
        output = subprocess.DEVNULL if quiet else subprocess.PIPE
        return subprocess.Popen(command, cwd=PACK, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)

    def finish(self, processes: int = 1) -> str:
        """Run to its end; what it printed."""
        process = self.start(processes)
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-3000:]
        return text

    def weights(self) -> dict[str, torch.Tensor]:
        from safetensors.torch import load_file

        return load_file(self.out / "extension.safetensors")

    def checkpoint(self) -> dict[str, torch.Tensor]:
        """The newest checkpoint's trained weights, in float32."""
        from safetensors.torch import load_file

        newest = sorted((self.out / "checkpoints").glob("step-????????"))[-1]
        return load_file(newest / "trained.safetensors")
