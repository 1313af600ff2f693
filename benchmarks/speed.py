"""Time of one UNet call, in ComfyUI with this pack and in the reference, with the same weights and inputs.

The two alternate.

python run.py bench speed [--frames 40] [--size 16] [--width narrow] [--repeats 7]
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
import torch

from . import report, unets


def main() -> int:
    parser = argparse.ArgumentParser(prog="run.py bench speed", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--size", type=int, default=16, help="height and width of the latents")
    parser.add_argument("--width", choices=list(unets.MULTIPLES), default="narrow", help="widths of the UNet")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: PyTorch's)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    dtype = torch.float16 if torch.cuda.is_available() else torch.float32
    weights = unets.random_weights(options.width, max(options.frames, 8), dtype)
    patched, unet = unets.ours(weights), unets.theirs(weights)
    inputs = unets.Inputs.random(options.frames, options.size, dtype)
    ours, theirs = unets.call_ours(patched, inputs), unets.call_theirs(unet, inputs)  # also warms up
    error = ((ours - theirs).norm() / theirs.norm()).item()
    times: list[tuple[float, float]] = []
    for repeat in range(options.repeats):
        seconds = _seconds(lambda: unets.call_ours(patched, inputs))
        times.append((seconds, _seconds(lambda: unets.call_theirs(unet, inputs))))
        print(f"{repeat + 1}/{options.repeats}: ours {times[-1][0]:.2f} s, reference {times[-1][1]:.2f} s", flush=True)
    our_times, reference_times = np.array(times).T
    ratios = our_times / reference_times
    low, median, high = np.percentile(ratios, [25, 50, 75])
    row = {
        "width": options.width, "frames": options.frames, "latents": options.size, "dtype": str(dtype),
        "ours_s": float(np.median(our_times)), "reference_s": float(np.median(reference_times)), "ratio": float(median),
        "ratio_quartiles": [float(low), float(high)], "relative_error": error, "repeats": options.repeats,
    }  # fmt: skip
    print(f"ratio {median:.3f} ({low:.3f} to {high:.3f}), relative error {error:.1e}")
    report.write("speed", [row])
    return 0


def _seconds(call) -> float:  # noqa: ANN001
    unets.synchronize()
    began = time.perf_counter()
    call()
    unets.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    sys.exit(main())
