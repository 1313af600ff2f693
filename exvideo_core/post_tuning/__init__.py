"""Post-tuning: makes an ExVideo extension for an SVD model from a folder of videos (paper section 3.3).

Start it with `python -m exvideo_core.post_tuning --help`.
"""
