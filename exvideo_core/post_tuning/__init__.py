"""Post-tuning: trains an ExVideo extension for an SVD model on a folder of videos (paper section 3.3).

See `python -m exvideo_core.post_tuning --help`.
"""
