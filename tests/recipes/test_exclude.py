"""Samples that one run has left out, left out by another from its beginning; and files that do not fit refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import swiftv2_run

from swiftv2.config.data import GridConfig
from swiftv2.config.load import load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.config.synth import SynthConfig
from swiftv2.data.changes.build import build
from swiftv2.data.synth import generate
from swiftv2.engine.stream import Exclusion
from swiftv2.errors import UsageError
from swiftv2.recipes.data import Data, open_data
from swiftv2.recipes.exclusions import read_exclusions, write_exclusions
from swiftv2.recipes.pretrain import pretrain
from swiftv2.records import read_metrics

CONFIG = """
run: {dir: unused}
data: {split: {fractions: [0.6, 0.4, 0.0], families: false}}
clip: {frames: 6, stride_between: 0.5}
model:
  name: tiny
  image_size: [32, 32, 32]
  frames: 6
  embed_dim: 8
  depths: [1]
  num_heads: [1]
  patch_size: [8, 8, 8, 2]
mask: {patch_size: [8, 8, 8, 2]}
engine: {backend: plain, precision: fp32, device: cpu}
schedule: {kind: constant, warmup_steps: 1}
train: {max_steps: 4, global_batch: 4, save_every: 2, evaluate_every: 4}
evaluate: {max_clips: 2}
"""
LEFT_OUT = [Exclusion(3, 8, "rewound"), Exclusion(0, 0, "asked"), Exclusion(5, 4)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exclude")
    generate(SynthConfig(subjects=8, voxel_mm=6, frames=24, session_share=0.0), folder / "bids")
    build(folder / "bids", folder / "store", GridConfig(voxel_mm=6), "a", salt="0" * 32)
    return folder / "store"


@pytest.fixture
def configured(store: Path, tmp_path: Path) -> Callable[..., PretrainConfig]:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return lambda *words: load(PretrainConfig, path, [f"data.store={store}", f"run.dir={tmp_path / 'run'}", *words])


@pytest.fixture
def data(configured: Callable[..., PretrainConfig]) -> Data:
    return open_data(configured())


def changed(path: Path, **values: Any) -> Path:
    """The file with the first entry, or the head, changed."""
    content = json.loads(path.read_text())
    for name, value in values.items():
        (content if name in content else content["exclusions"][0])[name] = value
    path.write_text(json.dumps(content))
    return path


def test_what_one_run_left_out_is_read_by_another(data: Data, tmp_path: Path) -> None:
    path = tmp_path / "exclusions.json"
    write_exclusions(path, data, LEFT_OUT)
    assert read_exclusions(path, data) == [(0, 0, "asked"), (3, 8, "asked"), (5, 4, "asked")]
    content = json.loads(path.read_text())
    assert (content["store"], content["version"]) == (data.store.attributes["store_id"], 1)
    run, start = data.store.runs[int(data.train.run[3])], int(data.train.start[3])
    expected = {"clip": 3, "position": 8, "cause": "rewound", "run": run.key, "first": start, "last": start + 5}
    assert content["exclusions"][1] == expected
    write_exclusions(path, data, [])
    assert read_exclusions(path, data) == []


def test_exclusions_come_as_pairs_as_triples_and_as_json_has_them(data: Data) -> None:
    order = data.order(0, 0, [(2, 12), [4, 8, "rewound"], Exclusion(1, 4, "asked")])
    assert order.exclusions == ((1, 4, "asked"), (2, 12, "unusable"), (4, 8, "rewound"))
    assert json.loads(json.dumps(order.exclusions))[0] == [1, 4, "asked"]
    positions = np.arange(3 * len(data.train))
    without = data.order(0, 0, [(2, 12), (4, 8), (1, 4)])
    np.testing.assert_array_equal(order.clips_at(positions), without.clips_at(positions))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"store": "another"}, "written on another store than"),
        ({"run": "r0"}, r"clip 0 is frames 2 to 7 of run r0 there, and 2 to 7 of run \w+ here"),
        ({"first": 3}, "clip 0 is frames 3 to 7"),
        ({"last": 6}, "clip 0 is frames 2 to 6"),
        ({"clip": 100_000}, r"names clip 100000 of \d+: "),
        ({"clip": -1}, r"exclusions\.0\.clip: "),
        ({"clip": "0"}, r"exclusions\.0\.clip: "),
        ({"position": 1.5}, r"exclusions\.0\.position: "),
        ({"cause": "bored"}, r"exclusions\.0\.cause: "),
        ({"version": True}, "version: "),
        ({"exclusions": {}}, "exclusions: "),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_begins(
    values: dict[str, Any], message: str, data: Data, configured: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    path = tmp_path / "exclusions.json"
    write_exclusions(path, data, LEFT_OUT)
    config = configured(f"data.exclude={changed(path, **values)}")
    with pytest.raises(UsageError, match=message) as told:
        pretrain(config)
    assert str(told.value).startswith(f"data.exclude={path}: ")
    assert "\n" not in str(told.value)
    assert not config.run.dir.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b'{"store": "x"}', None])
def test_what_is_no_such_file_is_refused(content: bytes | None, data: Data, tmp_path: Path) -> None:
    path = tmp_path / "exclusions.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=r"exclusions\.json: ") as told:
        read_exclusions(path, data)
    assert "\n" not in str(told.value)


def test_clips_cut_otherwise_are_refused(data: Data, configured: Callable[..., PretrainConfig], tmp_path: Path) -> None:
    path = tmp_path / "exclusions.json"
    write_exclusions(path, data, LEFT_OUT)
    other = open_data(configured("clip.stride_between=1.0", f"data.exclude={path}"))
    with pytest.raises(UsageError, match=r"clip 3 is frames 11 to 16 of run \w+ there, and 2 to 7 of run \w+ here"):
        read_exclusions(path, other)


@pytest.mark.slow
def test_a_run_leaves_out_what_it_is_asked_to_and_keeps_a_list_of_it(
    data: Data, store: Path, configured: Callable[..., PretrainConfig], tmp_path: Path
) -> None:
    """In one go, and resumed on two ranks when the file is gone."""
    asked = tmp_path / "asked.json"
    second = sorted(int(clip) for clip in data.order(0, 0, []).clips_at(np.arange(4, 8)))
    write_exclusions(asked, data, [Exclusion(clip, 4, "rewound") for clip in second])

    def trained(name: str, *words: str, ranks: int = 1) -> list[float]:
        words = (f"run.dir={tmp_path / name}", *words)
        if ranks == 1:
            pretrain(configured(*words))
        else:
            done = swiftv2_run(["pretrain", str(tmp_path / "config.yaml"), f"data.store={store}", *words], ranks=ranks)
            assert done.returncode == 0, done.stderr
        return [row["loss"] for row in read_metrics(tmp_path / name / "metrics.jsonl")]

    one = trained("one", f"data.exclude={asked}")
    kept = json.loads((tmp_path / "one" / "exclusions.json").read_text())["exclusions"]
    assert [(entry["clip"], entry["position"], entry["cause"]) for entry in kept] == [(clip, 4, "asked") for clip in second]
    trained("resumed", f"data.exclude={asked}", "train.max_steps=2")
    asked.unlink()
    np.testing.assert_allclose(trained("resumed", f"data.exclude={asked}", ranks=2), one, rtol=5e-6)
    assert json.loads((tmp_path / "resumed" / "exclusions.json").read_text())["exclusions"] == kept
    assert [row["clips_left_out"] for row in read_metrics(tmp_path / "resumed" / "metrics.jsonl")] == [4.0] * 4
