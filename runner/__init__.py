"""What `run.py` does: finds ComfyUIs, makes environments, starts servers. Not part of the nodes."""
