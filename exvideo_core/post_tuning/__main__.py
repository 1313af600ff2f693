"""`python -m exvideo_core.post_tuning`: trains an extension. Running the same command again resumes it."""

from __future__ import annotations

import logging
import sys

from ..files.safetensors_header import ModelFileError
from .config import ConfigError, parse

#: Module -> package to install.
_REQUIREMENTS = {"accelerate": "accelerate", "av": "av", "diffusers": "diffusers", "transformers": "transformers",
           "yaml": "pyyaml", "tqdm": "tqdm"}  # fmt: skip


def main() -> int:
    """Run post-tuning. Returns 0 when finished, 2 on errors, 130 when stopped by the user."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    import importlib.util

    try:
        config = parse()
        missing = [package for module, package in _REQUIREMENTS.items() if importlib.util.find_spec(module) is None]
        if missing:
            raise ConfigError(f"Post-tuning needs additional packages: pip install {' '.join(missing)}")
        from .train import train

        path = train(config)
    except (ConfigError, ModelFileError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if path is None:
        print("Stopped. Run the same command again to resume.")
        return 130
    print(f"Finished: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
