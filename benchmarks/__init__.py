"""Figures of this project, each made by one command: `python run.py bench NAME`."""
