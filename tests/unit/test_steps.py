"""The rows of `bench steps` and their cache files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks import steps


def test_rows_have_names_of_their_own_and_kinds_that_fit() -> None:
    rows = [*steps.rows(), *steps.few_step_rows("few-step")]
    assert len({row.name for row in rows}) == len(rows) == len(set(rows))
    assert [row.name for row in rows if row.kind == "exact"] == ["euler, 50 steps"]
    for row in rows:
        if row.kind == "undistilled":
            assert row == steps.Row(row.name, "undistilled", row.steps), row
        if row.kind == "few-step":
            assert row == steps.Row(row.name, "few-step", row.steps, guidance=1.0)


def test_a_cached_video_belongs_to_its_row_and_models(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for file in files:
        file.write_bytes(file.name.encode())
    row = steps.rows()[0]
    makers = [steps.Maker(files[0], files[1]), steps.Maker(files[0], files[2]), steps.Maker(files[2], files[1])]
    paths = {maker.path(each, 0) for maker in makers for each in steps.rows()}
    assert len(paths) == 3 * len(steps.rows())
    assert makers[0].path(row, 0) == steps.Maker(files[0], files[1]).path(row, 0)
    assert makers[0].path(row, 0) != steps.Maker(files[0], files[1], difference=files[2]).path(row, 0)
    assert makers[0].path(row, 0).parent == makers[0].path(row, 1).parent != makers[0].path(steps.rows()[1], 0).parent


def test_clips_that_are_not_cached_are_made_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "KEPT", tmp_path / "kept")
    model = tmp_path / "model"
    model.write_bytes(b"model")
    maker = steps.Maker(model, model, batch=2)
    plain = steps.rows()[0]
    cached = next(row for row in steps.rows() if row.cache is not None)
    assert maker.missing(plain, 5) == [[0, 1], [2, 3], [4]]
    assert maker.missing(cached, 2) == [[0], [1]]
    maker.path(plain, 1).parent.mkdir(parents=True)
    maker.path(plain, 1).touch()
    assert maker.missing(plain, 4) == [[0, 2], [3]]
    alone = steps.Maker(model, model)
    assert maker.path(plain, 0) != alone.path(plain, 0)
    assert maker.path(cached, 0) == alone.path(cached, 0)


def test_a_row_summarizes_its_videos() -> None:
    row = steps.rows()[0]
    random = np.random.default_rng(0)
    found = [steps.Measured({"presence": each / 4}, each % 3, random.normal(size=2), 50) for each in range(4)]
    result = steps.summary(row, found, random.normal(size=(8, 2)))
    assert (result["row"], result["kind"], result["calls"], result["clips"]) == (row.name, "exact", 50.0, 4)
    assert result["metric"]["presence"]["mean"] == 0.375
    assert result["metric"]["heading_right"]["mean"] == 3 / 8
    assert result["metric"]["frechet"]["mean"] > 0
