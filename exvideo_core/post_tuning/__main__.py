"""`python -m exvideo_core.post_tuning`: trains an extension; start the same command again to resume it."""

from __future__ import annotations

import logging
import sys

from ..files.safetensors_header import ModelFileError
from .config import ConfigError, parse

#: What the training needs beyond the pack itself -> how to install it.
_NEEDED = {"accelerate": "accelerate", "av": "av", "diffusers": "diffusers", "transformers": "transformers",
           "yaml": "pyyaml", "tqdm": "tqdm"}  # fmt: skip


def main() -> int:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    import importlib.util

    try:
        config = parse()
        missing = [package for module, package in _NEEDED.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ConfigError(f"Post-tuning needs additional packages: pip install {' '.join(missing)}")
        from .train import train

        finished = train(config)
    except (ConfigError, ModelFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if finished is None:
        print("Stopped. Run the same command again to resume.")
        return 130
    print(f"Finished: {finished}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
