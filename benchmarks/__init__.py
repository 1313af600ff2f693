"""Benchmarks of this project: `python run.py bench NAME`."""
