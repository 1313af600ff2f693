"""Loads and validates SVD checkpoints of any width."""
