"""Pytest plugin that gives tests a simulated card with dynamic VRAM. Load it with `-p`."""

from __future__ import annotations

from . import active, install

install(dynamic=True)
_mode = active()
_mode.__enter__()  # never exited: it is active while pytest collects and runs tests
