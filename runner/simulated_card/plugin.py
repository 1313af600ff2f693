"""For pytest's `-p`: tests that ask for a CUDA card get a simulated one, with dynamic VRAM."""

from __future__ import annotations

from . import active, install

install(dynamic=True)
_mode = active()
_mode.__enter__()  # for as long as pytest runs, its collection included
