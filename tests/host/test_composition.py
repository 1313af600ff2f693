"""Other nodes on an extended model do what they do on the base, again and again, and leave the base as it was."""

from __future__ import annotations

import pytest
import torch

import svd
from composition import CASES, Case, sample, unchanged
from exvideo_core.comfyui.apply.patch import apply_extension
from exvideo_core.comfyui.checkpoint.load import load_checkpoint
from exvideo_core.method.extension import Extension


class Models:
    """The base and the extended model, with their results under settings that cases share."""

    def __init__(self, paths) -> None:
        self.base = load_checkpoint(str(paths[0]))[0]
        self.extended = apply_extension(self.base, Extension.load(paths[1]))
        self._plain: dict[tuple, torch.Tensor] = {}

    def plain(self, model, **sampling) -> torch.Tensor:
        key = id(model), *(tuple(value.shape) if torch.is_tensor(value) else value for value in sampling.values())
        if key not in self._plain:
            self._plain[key] = sample(model, **sampling)
        return self._plain[key]


@pytest.fixture(scope="module")
def models(small_models) -> Models:
    return Models(small_models)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_it_does_what_it_does_on_the_base(models: Models, case: Case) -> None:
    # Held against the same clip without what the case changes: the model, or the sampler's arguments.
    compared = case.sampling
    if case.apply is unchanged:
        compared = {name: value for name, value in compared.items() if name in ("noise", "latent")}
    effects = []
    for model in (models.base, models.extended):
        changed = case.apply(model)
        try:
            result = sample(changed, **case.sampling)
        except Exception as error:
            if model is models.extended:
                raise
            pytest.skip(f"fails on the plain model of this ComfyUI: {error}")
        assert sample(changed, **case.sampling).equal(result), "a second run differs"
        effects.append(svd.relative_error(result, models.plain(model, **compared)))
    print(f"{case.name}: {effects[0]:.4f} on the base, {effects[1]:.4f} on the extended model")
    assert effects[0] > 1e-3, "the case does nothing, and tells nothing"
    assert effects[0] / case.factor < effects[1] < effects[0] * case.factor
    for model in (models.base, models.extended):
        assert sample(model).equal(models.plain(model)), "the model is not as it was"
