"""Tools of `run.py`: finds ComfyUI installs, creates environments, starts servers. Not used by the nodes."""
