"""What the objective counts beside its loss: the work of a real pass, tokens with brain, what copying would lose."""

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from swiftv2.config.load import build
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.data.samples.batch import Batch
from swiftv2.data.samples.normalise import normalise
from swiftv2.recipes.baselines import time_interpolation, visible_mean
from swiftv2.recipes.objective import BASELINE_STEPS, Objective
from swiftv2.recipes.planning import Window, make_batch

SHAPE, FRAMES, CLIPS = (10, 18, 10), 8, 4
MODEL = {
    "name": "tiny",
    "image_size": list(SHAPE),
    "frames": FRAMES,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "patch_size": [2, 3, 2, 2],
    "decoder": {"visible": {"width": 16, "num_heads": 2, "skip": True}},
}


def _config(objective: str = "simmim", packing: str = "none", **loss: Any) -> PretrainConfig:
    tree = {
        "run": {"dir": "run"},
        "data": {"store": "store", "normalisation": {"kind": "znorm_zeroback", "scope": "clip"}},
        "objective": objective,
        "clip": {"frames": FRAMES},
        "model": MODEL | {"packing": packing},
        "mask": {"patch_size": [2, 3, 2, 2], "among": "brain", "ratio": 0.6},
        "loss": loss,
        "train": {"max_steps": 20, "global_batch": CLIPS},
    }
    return build(PretrainConfig, tree, where="test")


def _made(config: PretrainConfig) -> tuple[Objective, Batch]:
    """An objective that counts, and a batch of clips whose brains differ."""
    rng = np.random.default_rng(0)
    kept = np.zeros(SHAPE, dtype=bool)
    kept[1:9, 2:15, 3:9] = True
    voxels = torch.from_numpy(np.flatnonzero(kept))
    batch = make_batch(config, Window(SHAPE, voxels, torch.int16, "test"), CLIPS)
    brain = torch.ones(CLIPS, len(voxels), dtype=torch.bool)
    for clip in range(CLIPS):
        brain[clip, : 60 * clip] = False
    bold = torch.from_numpy(rng.normal(1000, 100, (CLIPS, FRAMES, len(voxels))).cumsum(1).astype(np.int16))
    objective = Objective(config, voxels, SHAPE)
    objective.count()
    objective.begin_step(1)
    return objective, dataclasses.replace(batch, bold=bold, brain=brain)


def _part(batch: Batch, first: int, last: int) -> Batch:
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return dataclasses.replace(batch, **{name: value[first:last] for name, value in fields.items() if value is not None})


def _numbers(objective: Objective, batch: Batch) -> dict[str, float]:
    objective(batch)
    return {name: float(value) for name, value in objective.counts.items()}


@pytest.mark.parametrize("packing", ["none", "template", "subject"])
@pytest.mark.parametrize("objective", ["simmim", "visible_only"])
def test_flops_are_three_times_those_of_a_real_forward_pass(objective: str, packing: str) -> None:
    module, batch = _made(_config(objective, packing))

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))  # type: ignore[no-untyped-call]

    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={kernel: attention}) as counter, torch.no_grad():
        module(batch)
    assert module.counts["flops"] == 3 * counter.get_total_flops()
    module.eval()
    module(batch)
    module.train()
    module(batch)
    assert module.counts["flops"] == 3 * counter.get_total_flops(), "evaluations do not count"


def test_tokens_are_the_patches_with_brain_of_each_clip() -> None:
    module, batch = _made(_config())
    found = 0
    for brain in batch.brain.numpy():
        volume = np.zeros(SHAPE, dtype=bool)
        volume.reshape(-1)[module.voxels.numpy()[brain]] = True
        padded = np.pad(volume, [(0, -n % p) for n, p in zip(SHAPE, (2, 3, 2), strict=True)])
        h, w, d = (n // p for n, p in zip(padded.shape, (2, 3, 2), strict=True))
        found += padded.reshape(h, 2, w, 3, d, 2).any((1, 3, 5)).sum() * FRAMES // 2
    assert _numbers(module, batch)["brain_tokens"] == found


@pytest.mark.parametrize("kind", ["l1", "l2", "smooth_l1", "huber"])
@pytest.mark.parametrize("over", ["brain_voxels", "brain_tokens", "everywhere"])
def test_copies_are_judged_as_the_model_is(kind: str, over: str) -> None:
    config = _config(kind=kind, over=over)
    module, batch = _made(config)
    counts = _numbers(module, batch)
    signal, _ = normalise(batch, config.data.normalisation)
    hidden = module.hidden(batch)
    for name, predict in (("visible_mean", visible_mean), ("time_interpolation", time_interpolation)):
        # In the place of the reconstruction, so that the model's own loss judges the copy.
        copied = predict(signal, hidden, batch.brain)
        dense = torch.zeros(CLIPS, *SHAPE, FRAMES).flatten(1, 3)
        dense[:, module.voxels] = copied.transpose(1, 2)
        module.simmim.reconstruct = lambda *_, copy=dense: copy.view(CLIPS, 1, *SHAPE, FRAMES)  # type: ignore[method-assign]
        module.eval()
        output, _ = module._run(batch)
        assert counts[f"baseline/{name}"] == pytest.approx(float(output.clip_loss.sum()), rel=1e-6)
        assert counts[f"baseline/{name}"] > 0


def test_counts_are_the_same_however_a_batch_is_split() -> None:
    module, batch = _made(_config("simmim", "subject", over="brain_tokens"))
    whole = _numbers(module, batch)
    parts = [_numbers(module, _part(batch, first, last)) for first, last in ((0, 1), (1, 2), (2, 4))]
    for name, value in whole.items():
        if name != "flops":  # groups of other clips are padded to other lengths
            assert sum(part[name] for part in parts) == pytest.approx(value, rel=1e-6), name
    assert sum(part["flops"] for part in parts) == pytest.approx(whole["flops"], rel=0.1)


def test_the_loss_is_what_it_is_without_counting() -> None:
    config = _config()
    module, batch = _made(config)
    plain = Objective(config, module.voxels, SHAPE)
    assert torch.equal(module(batch), plain(batch))
    assert plain.counts == {}


@pytest.mark.parametrize(("log_every", "compared"), [(1, [1, 10, 20, 30]), (4, [1, 12, 24]), (25, [1, 25])])
def test_copies_are_looked_at_in_steps_that_are_logged(log_every: int, compared: list[int]) -> None:
    config = _config()
    train = config.train.model_copy(update={"log_every": log_every})
    module, batch = _made(config.model_copy(update={"train": train}))
    found = []
    for step in range(1, 3 * BASELINE_STEPS + 1):
        module.begin_step(step)
        if step in {1, 2, *compared, *(one + 1 for one in compared)}:
            found += [step] if "baseline/visible_mean" in _numbers(module, batch) else []
    assert found == compared
