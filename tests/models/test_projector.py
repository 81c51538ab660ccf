"""The projector: reproducible, unit length where asked, trainable by a contrastive loss, the same from its file."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from swiftv2.errors import SwiftError
from swiftv2.models.projector import Projector
from swiftv2.recipes.projection import load_projector, save_projector


def test_it_goes_to_512_dimensions_by_1024_and_ends_in_a_layer_norm() -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    projector = Projector(96).eval()
    assert torch.equal(torch.random.get_rng_state(), before)
    found = projector(torch.randn(7, 3, 96))
    assert found.shape == (7, 3, 512)
    assert [tuple(p.shape) for p in projector.parameters() if p.ndim == 2] == [(1024, 96), (512, 1024)]
    torch.testing.assert_close(found.mean(-1), torch.zeros(7, 3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(-1, correction=0), torch.ones(7, 3), atol=1e-3, rtol=0)
    values = [next(Projector(96, seed=seed).parameters()) for seed in (0, 1)]
    assert torch.equal(values[0], next(projector.parameters()))
    assert not torch.equal(values[1], values[0])


def test_a_contrastive_loss_aligns_two_modalities() -> None:
    generator = torch.Generator().manual_seed(0)
    shared = torch.randn(32, 6, generator=generator)
    brain, genes = shared @ torch.randn(6, 24, generator=generator), shared @ torch.randn(6, 40, generator=generator)
    one, two = Projector(24, 64, 16, dropout=0.0, unit=True), Projector(40, 64, 16, dropout=0.0, unit=True, seed=1)

    def matched() -> float:
        with torch.no_grad():
            return float(((one(brain) @ two(genes).T).argmax(1) == torch.arange(32)).float().mean())

    assert matched() < 0.3
    optimizer = torch.optim.Adam([*one.parameters(), *two.parameters()], lr=3e-3)
    for _ in range(60):
        logits = one(brain) @ two(genes).T / 0.1
        loss = functional.cross_entropy(logits, torch.arange(32)) + functional.cross_entropy(logits.T, torch.arange(32))
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    assert matched() > 0.9
    torch.testing.assert_close(one(brain).norm(dim=-1), torch.ones(32))


def test_a_file_brings_it_back_and_knows_the_weights_it_goes_on(tmp_path: Path) -> None:
    projector = Projector(10, 12, 8, dropout=0.25, unit=True, seed=3).to(torch.bfloat16).eval()
    save_projector(tmp_path / "p.safetensors", projector, "a" * 64)
    loaded = load_projector(tmp_path / "p.safetensors", "a" * 64)
    embeddings = torch.randn(4, 10)
    torch.testing.assert_close(loaded(embeddings), projector(embeddings).float(), atol=2e-2, rtol=2e-2)
    assert (loaded.dropout, loaded.unit, loaded.training) == (0.25, True, False)
    with pytest.raises(SwiftError, match="other weights"):
        load_projector(tmp_path / "p.safetensors", "b" * 64)
    (tmp_path / "p.safetensors").write_bytes((tmp_path / "p.safetensors").read_bytes()[:50])
    with pytest.raises(SwiftError, match="no projector"):
        load_projector(tmp_path / "p.safetensors")
