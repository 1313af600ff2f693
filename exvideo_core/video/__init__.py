"""Frames of a video: preparing, blending, charting and writing them."""
