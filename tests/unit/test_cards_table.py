"""How `bench cards` sums a clip's stages up."""

from __future__ import annotations

from benchmarks import cards


def _stage(name: str, setting: str, peak: float, error: str | None = None) -> dict:
    return {
        "size": "512x512", "card_gb": 8.0, "loading": "dynamic", "stage": name, "setting": setting, "error": error,
        "fits": error is None, "figures": {"peak_gib": peak}, "weights": {"SVD_img2vid": [3.0, 3.5]},
    }  # fmt: skip


def test_the_setting_that_fits_is_shown() -> None:
    rows = [
        _stage("conditioning", "defaults", 1.5),
        _stage("sampling", "defaults", 7.0, "OutOfMemoryError: CUDA out of memory."),
        _stage("sampling", "skips in RAM", 6.0),
        _stage("decode", "defaults", 7.0, "OutOfMemoryError: CUDA out of memory."),
        _stage("decode", "chunks of 8 frames", 3.0),
    ]
    found = cards._summary(rows)
    assert found["fits"] and found["sampling_gib"] == 6.0 and found["decode_gib"] == 3.0
    table = cards._overview([found], 128)
    assert "| 512x512 | skips in RAM, decode in chunks of 8 frames |" in table


def test_a_stage_that_fits_with_nothing_is_a_no() -> None:
    failed = "OutOfMemoryError: CUDA out of memory."
    rows = [
        _stage("conditioning", "defaults", 1.5),
        _stage("sampling", "defaults", 7.0, failed),
        _stage("decode", "defaults", 7.0),
    ]
    found = cards._summary(rows)
    assert not found["fits"] and found["sampling"] == "does not fit"
    assert "| 512x512 | no |" in cards._overview([found], 128)
