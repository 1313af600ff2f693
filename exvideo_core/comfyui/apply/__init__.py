"""Applies an extension to a model."""
