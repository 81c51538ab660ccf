"""What a user may write in a configuration, and what the answer is when it is wrong."""

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from swiftv2.config.engine import split_batch
from swiftv2.config.load import describe, dump, load, load_model, presets_root
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError

SMALL = """
run: {dir: runs/x}
data: {store: cohort.zarr}
model: {preset: 5M, frames: 24}
clip: {frames: 24}
train: {max_steps: 3, global_batch: 8}
"""


@pytest.fixture
def small(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(SMALL, encoding="utf-8")
    return path


def test_a_resolved_configuration_reads_back_the_same(small: Path, tmp_path: Path) -> None:
    config = load(PretrainConfig, small, ["train.max_steps=7", "optimizer.lr=3e-4", "model.drop_path=0.1"])
    assert config.train.max_steps == 7
    assert config.optimizer.lr == 3e-4
    assert (config.model.name, config.model.frames, config.model.drop_path) == ("5M", 24, 0.1)
    again = tmp_path / "again.yaml"
    again.write_text(dump(config), encoding="utf-8")
    assert load(PretrainConfig, again) == config


def test_a_preset_named_by_override_keeps_the_other_model_overrides(small: Path) -> None:
    config = load(PretrainConfig, small, ["model=7M", "model.frames=24"])
    assert (config.model.name, config.model.frames) == ("7M", 24)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("train.max_step=3", "unknown key train.max_step; did you mean train.max_steps?"),
        ("train.max_steps=many", "train.max_steps takes a whole number, not many"),
        ("train.max_steps=1.5", "train.max_steps takes a whole number, not 1.5"),
        ("train.max_steps=0", "train.max_steps takes a number above 0, not 0"),
        ("data.prefetch=100", "data.prefetch takes a number up to 64, not 100"),
        ("optimizer.lr=.nan", "optimizer.lr takes a finite number, not .nan"),
        ("optimizer.lr=fast", "optimizer.lr takes a number, not fast"),
        ("mask.ratio=1.5", "mask.ratio takes a number below 1, not 1.5"),
        ("loss.kind=l3", "loss.kind takes 'l1', 'smooth_l1', 'huber' or 'l2', not l3"),
        ("data.allow_cleaned=maybe", "data.allow_cleaned takes true or false, not maybe"),
        ("data.cohorts=ukb", "data.cohorts takes a list, such as [1, 2], not ukb"),
        ("mask.patch_size=[6, 6]", "mask.patch_size takes a list of 4, not [6, 6]"),
        ("mask.patch_size=[6, 6, 6, 2, 2]", "mask.patch_size takes a list of 4 at most, not [6, 6, 6, 2, 2]"),
        ("data.store=", "data.store takes a path, not null"),
        ("train=5", "train takes keys with values, such as {key: value}, not 5"),
        ("loss.zzz=1", "unknown key loss.zzz; keys of loss are kind, "),
        ("zzz=1", "unknown key zzz; keys are run, "),
        ("data.normalisation={kind: per_voxel, scope: clip}", "use scope=run"),
        ("mask.patch_size=[6, 6, 6, 5]", "must divide the padded clip"),
        ("mask.patch_size=[9, 9, 9, 2]", "must be a multiple of model.patch_size"),
        ("clip.frames=48", "raise model.frames"),
        ("model.num_heads=[5, 6, 12, 24]", "not divisible by 5 heads"),
        ("model.preset=900M", "presets are 202M, "),
        ("data.split.fractions=[0.5, 0.1, 0.1]", "sum to 1"),
        ("train", "write it as section.key=value"),
        ("run.dir.x=1", "is a value, not a section"),
        ("train.max_steps=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_key(small: Path, word: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        load(PretrainConfig, small, [word])
    message = str(caught.value)
    assert says in message
    assert "\n" not in message


def test_the_source_of_a_wrong_value_is_named(small: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load(PretrainConfig, small, ["train.max_steps=5", "loss.kind=l1", "loss.kind=l3"])
    assert str(caught.value).startswith(f"{small} with loss.kind=l3: loss.kind takes ")
    text = small.read_text(encoding="utf-8")
    small.write_text(text + "\nevaluate: {split: train, batch: 0}\n", encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        load(PretrainConfig, small, ["train.max_steps=5"])
    assert str(caught.value) == f"{small}: evaluate.split takes 'val' or 'test', not train (and 1 more)"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"a: [1", "not valid YAML at line"),
        (b"- 1", "expected a mapping"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"!!python/object/apply:os.system ['true']", "not valid YAML"),
        (b"run: {dir: x}\n", "is required and not given"),
    ],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        load(PretrainConfig, path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="give a YAML configuration file"):
        load(PretrainConfig, tmp_path / "none.yaml")


@pytest.mark.parametrize("path", sorted((presets_root() / "pretrain").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_shipped_pretraining_preset_is_valid(path: Path) -> None:
    config = load(PretrainConfig, path)
    assert config.model.name == path.stem
    split_batch(config.train.global_batch, 2, config.train.micro_batch)


@pytest.mark.parametrize("path", sorted((presets_root() / "model").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_model_preset_carries_its_own_name(path: Path) -> None:
    assert load_model(path.stem).name == path.stem == yaml.safe_load(path.read_text(encoding="utf-8"))["name"]


def test_every_field_is_documented() -> None:
    assert [key for key, _, text in describe(PretrainConfig) if not text] == []


@given(world=st.integers(1, 16), micro=st.integers(1, 8), accumulation=st.integers(1, 8))
def test_a_possible_split_is_found(world: int, micro: int, accumulation: int) -> None:
    assert split_batch(world * micro * accumulation, world, micro) == (micro, accumulation)


def test_an_impossible_split_names_those_that_work() -> None:
    with pytest.raises(UsageError, match="world sizes that work: 1, 2, 4, 8"):
        split_batch(8, 3, None)
    with pytest.raises(UsageError, match="micro-batches that work: 1, 2, 4"):
        split_batch(8, 2, 3)
