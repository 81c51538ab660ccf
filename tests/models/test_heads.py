"""Pooling over tokens that hold brain, and heads."""

import pytest
import torch

from swiftv2.config.finetune import HeadConfig
from swiftv2.config.model import ModelConfig
from swiftv2.models.heads import Head, Pool, Predictor, pooled_tokens
from swiftv2.models.swin4d import Swin4D

SIZES = {"image_size": (12, 8, 8), "frames": 4, "embed_dim": 12, "depths": (1, 1), "num_heads": (2, 2)}
MODEL = ModelConfig.model_validate(
    {"name": "small", "patch_size": (4, 4, 4, 2), "window_size": (2, 2, 2, 2), "first_window_size": (2, 2, 2, 2), **SIZES}
)


def test_tokens_that_count_are_those_above_any_brain_voxel() -> None:
    brain = torch.zeros(1, 12, 8, 8, dtype=torch.bool)
    brain[0, 9, 0, 0] = True
    first = pooled_tokens(MODEL, brain, (3, 2, 2, 2))
    assert first.nonzero().tolist() == [[0, 2, 0, 0]]
    # Three tokens are merged two and two, padded on the right.
    assert pooled_tokens(MODEL, brain, (2, 1, 1, 2)).nonzero().tolist() == [[0, 1, 0, 0]]


def test_swift_v1_averages_over_its_whole_grid() -> None:
    published = ModelConfig.model_validate(MODEL.model_dump() | {"variant": "swift_v1", "patch_size": (3, 2, 2, 1)})
    assert pooled_tokens(published, torch.zeros(2, 12, 8, 8, dtype=torch.bool), (2, 2, 2, 4)).all()


@pytest.mark.parametrize("kind", ["mean", "mean_std", "attention"])
def test_what_holds_no_brain_never_counts(kind: str) -> None:
    pool = Pool(kind, 6)  # type: ignore[arg-type]
    features = torch.randn(2, 6, 3, 2, 2, 4)
    counted = torch.rand(2, 3, 2, 2) > 0.3
    counted[:, 0, 0, 0] = True
    changed = torch.where(counted[:, None, ..., None], features, 1e3)
    out = pool(features, counted)
    assert out.shape == (2, pool.width)
    assert torch.allclose(out, pool(changed, counted), atol=1e-5)
    if kind != "attention":
        tokens = features[0].permute(1, 2, 3, 4, 0)[counted[0]].reshape(-1, 6)
        assert torch.allclose(out[0, :6], tokens.mean(0), atol=1e-6)
    if kind == "mean_std":
        assert torch.allclose(out[0, 6:], tokens.std(0, correction=0), atol=1e-4)


def test_dropout_is_decided_by_the_draws_alone_and_in_training_alone() -> None:
    head = Head(HeadConfig(dropout=0.5, norm=False), 4, 1)
    x, draws = torch.ones(1, 4), torch.tensor([[0.1, 0.9, 0.6, 0.2]])
    kept = torch.tensor([[0.0, 2.0, 2.0, 0.0]])
    assert torch.allclose(head(x, draws), head.out(kept))
    head.eval()
    assert torch.allclose(head(x, draws), head.out(x))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_predictor_starts_the_same_from_the_same_seed(kind: str) -> None:
    volume, brain = torch.randn(2, 1, 12, 8, 8, 4), torch.ones(2, 12, 8, 8, dtype=torch.bool)
    config = HeadConfig.model_validate({"kind": kind})
    one, same, other = (Predictor(Swin4D(MODEL, seed=1), config, 3, seed) for seed in (5, 5, 6))
    assert one(volume, brain).shape == (2, 3)
    assert torch.equal(one(volume, brain), same(volume, brain))
    assert not torch.equal(one(volume, brain), other(volume, brain))
