import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from swiftv2.config.data import NormalisationConfig
from swiftv2.data.samples.normalise import gather, normalise, scaling, scatter

KINDS = ["none", "minmax", "znorm_zeroback", "znorm_minback", "robust", "per_voxel"]


@dataclass(frozen=True)
class Packed:
    bold: Tensor
    slope: Tensor
    intercept: Tensor
    statistics: Tensor
    voxel_mean: Tensor | None
    voxel_std: Tensor | None
    brain: Tensor


def _statistics(values: np.ndarray) -> list[float]:
    low, middle, high = np.percentile(values, [25, 50, 75])
    return [values.mean(), values.std(), values.min(), values.max(), middle, high - low]


def _packed(seed: int = 0, clips: int = 3, frames: int = 6, voxels: int = 40, dtype: torch.dtype = torch.int16) -> Packed:
    """Clips cut from runs of three times their length, so that the run's statistics are not the clip's."""
    rng = np.random.default_rng(seed)
    runs = rng.integers(1000, 9000, (clips, 3 * frames, voxels))
    slope, intercept = rng.uniform(0.2, 2.0, clips), rng.uniform(-50, 50, clips)
    brain = rng.random((clips, voxels)) < 0.7
    source = runs * slope[:, None, None] + intercept[:, None, None]
    inside = [source[b][:, brain[b]] for b in range(clips)]
    return Packed(
        bold=torch.from_numpy(runs[:, frames : 2 * frames]).to(dtype),
        slope=torch.tensor(slope, dtype=torch.float32),
        intercept=torch.tensor(intercept, dtype=torch.float32),
        statistics=torch.tensor([_statistics(v) for v in inside], dtype=torch.float32),
        voxel_mean=torch.tensor(source.mean(1), dtype=torch.float32),
        voxel_std=torch.tensor(source.std(1), dtype=torch.float32),
        brain=torch.from_numpy(brain),
    )


def _expected(batch: Packed, config: NormalisationConfig) -> tuple[np.ndarray, np.ndarray]:
    """The table of the module's head, clip by clip."""
    assert batch.voxel_mean is not None
    assert batch.voxel_std is not None
    signals, fills = [], []
    for b in range(len(batch.bold)):
        x = batch.bold[b].double().numpy() * float(batch.slope[b]) + float(batch.intercept[b])
        brain = batch.brain[b].numpy()
        own = _statistics(x[:, brain])
        mean, std, low, high, median, spread = batch.statistics[b].tolist() if config.scope == "run" else own
        voxel = (batch.voxel_mean[b].numpy(), batch.voxel_std[b].numpy())
        centre, scale = voxel if config.scope == "run" else (x.mean(0), x.std(0))
        signal = {
            "none": x,
            "minmax": (x - low) / (high - low),
            "znorm_zeroback": (x - mean) / std,
            "znorm_minback": (x - mean) / std,
            "robust": (x - median) / spread,
            "per_voxel": (x - centre) / scale,
        }[config.kind]
        fill = (low - mean) / std if config.kind == "znorm_minback" else 0.0
        signal[:, ~brain] = fill
        signals.append(signal)
        fills.append(fill)
    return np.array(signals), np.array(fills)


@pytest.mark.parametrize(("kind", "scope"), list(itertools.product(KINDS, ["run", "clip"])))
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.float32])
def test_every_recipe_equals_its_formula(kind: str, scope: str, dtype: torch.dtype) -> None:
    config = NormalisationConfig.model_validate({"kind": kind, "scope": scope})
    batch = _packed(dtype=dtype)
    signal, fill = normalise(batch, config)
    expected, expected_fill = _expected(batch, config)
    assert signal.dtype == fill.dtype == torch.float32
    # float32 keeps 24 bits of values up to about 1e4 before they are centred: 1e-3 in source units.
    tolerance = 2e-3 if kind == "none" else 2e-5
    np.testing.assert_allclose(signal.numpy(), expected, rtol=1e-5, atol=tolerance)
    np.testing.assert_allclose(fill.numpy(), expected_fill, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scope", ["run", "clip"])
def test_the_background_at_the_minimum_lies_below_every_brain_voxel(scope: str) -> None:
    batch = _packed(seed=2)
    signal, fill = normalise(batch, NormalisationConfig.model_validate({"kind": "znorm_minback", "scope": scope}))
    for b in range(len(signal)):
        lowest = float(signal[b][:, batch.brain[b]].min())
        assert float(fill[b]) <= lowest + 1e-5
        assert (signal[b][:, ~batch.brain[b]] == fill[b]).all()
        if scope == "clip":
            assert float(fill[b]) == pytest.approx(lowest, abs=1e-5)


@pytest.mark.parametrize(("kind", "scope"), list(itertools.product(KINDS[1:], ["run", "clip"])))
def test_what_is_constant_becomes_zero_and_never_nan(kind: str, scope: str) -> None:
    batch = _packed()
    batch.bold[1] = 4321
    batch.bold[2, :, 5] = 1234
    batch.brain[2, 5] = True
    batch.statistics[1] = torch.tensor([4321.0, 0.0, 4321.0, 4321.0, 4321.0, 0.0])
    assert batch.voxel_std is not None
    batch.voxel_std[1] = 0
    batch.voxel_std[2, 5] = 0
    signal, fill = normalise(batch, NormalisationConfig.model_validate({"kind": kind, "scope": scope}))
    assert torch.isfinite(signal).all()
    assert torch.isfinite(fill).all()
    assert (signal[1] == 0).all()
    if kind == "per_voxel":
        assert (signal[2, :, 5] == 0).all()


@pytest.mark.parametrize(("kind", "scope"), list(itertools.product(KINDS, ["run", "clip"])))
def test_a_clip_without_brain_is_background_only(kind: str, scope: str) -> None:
    batch = _packed()
    batch.brain[0] = False
    signal, fill = normalise(batch, NormalisationConfig.model_validate({"kind": kind, "scope": scope}))
    assert torch.isfinite(signal).all()
    assert (signal[0] == fill[0]).all()


@pytest.mark.parametrize(("kind", "scope"), list(itertools.product(KINDS, ["run", "clip"])))
def test_scaled_values_come_back_to_source_units(kind: str, scope: str) -> None:
    config = NormalisationConfig.model_validate({"kind": kind, "scope": scope})
    batch = _packed()
    batch.bold[0, :, 3] = 2000
    batch.brain[0, 3] = True
    signal, fill = normalise(batch, config)
    scale = scaling(batch, config)
    source = batch.bold * batch.slope.view(-1, 1, 1) + batch.intercept.view(-1, 1, 1)
    inside = batch.brain[:, None].expand_as(source)
    torch.testing.assert_close(scale.to_source(signal)[inside], source[inside], rtol=1e-5, atol=1e-2)
    torch.testing.assert_close(scale.fill, fill, rtol=0, atol=0)


def test_the_batch_itself_is_left_as_it_was() -> None:
    batch = _packed(dtype=torch.float32)
    before = batch.bold.clone()
    normalise(batch, NormalisationConfig())
    torch.testing.assert_close(batch.bold, before, rtol=0, atol=0)


def test_per_voxel_without_its_statistics_is_refused() -> None:
    full = _packed()
    bare = Packed(full.bold, full.slope, full.intercept, full.statistics, None, None, full.brain)
    with pytest.raises(ValueError, match="voxel_mean"):
        normalise(bare, NormalisationConfig(kind="per_voxel"))
    normalise(bare, NormalisationConfig(kind="per_voxel", scope="clip"))


@settings(deadline=None)
@given(
    st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(0, 1000),
)
def test_scatter_puts_each_voxel_in_its_place_and_gather_takes_it_back(
    grid: tuple[int, int, int], clips: int, frames: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    size = math.prod(grid)
    voxels = np.sort(rng.choice(size, rng.integers(1, size + 1), replace=False))
    packed = torch.from_numpy(rng.standard_normal((clips, frames, len(voxels))).astype(np.float32))
    fill = torch.arange(clips, dtype=torch.float32) - 7
    volume = scatter(packed, torch.from_numpy(voxels), grid, fill)
    assert volume.shape == (clips, 1, *grid, frames)
    torch.testing.assert_close(gather(volume, torch.from_numpy(voxels)), packed, rtol=0, atol=0)
    for b in range(clips):
        expected = np.full((size, frames), float(fill[b]), dtype=np.float32)
        expected[voxels] = packed[b].numpy().T
        np.testing.assert_array_equal(volume[b, 0].reshape(size, frames).numpy(), expected)


def test_scatter_takes_masks_and_one_fill() -> None:
    brain = torch.tensor([[[True, False]]])
    assert scatter(brain, torch.tensor([1, 2]), (2, 2, 1)).flatten().tolist() == [False, True, False, False]
    assert scatter(torch.ones(1, 1, 1), torch.tensor([0]), (2, 1, 1), 3.0).flatten().tolist() == [1.0, 3.0]
    with pytest.raises(ValueError, match="one channel"):
        gather(torch.zeros(1, 2, 2, 2, 1, 1), torch.tensor([0]))
