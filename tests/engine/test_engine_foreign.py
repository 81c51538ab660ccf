"""Checkpoints that DeepSpeed alone has written, adopted: the run goes on as if nothing had happened, or nothing is made."""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import environment, worker

from swiftv2 import cli
from swiftv2.engine.checkpoint import list_checkpoints
from swiftv2.engine.foreign import MODEL_FILE
from swiftv2.engine.shards import SavedState
from swiftv2.records import read_lines, read_metrics

DEMO = Path(__file__).parents[2] / "configs" / "pretrain" / "demo.yaml"
COMMON = ["train.max_steps=8", "train.global_batch=8", "train.save_every=4", "optimizer.lr=1e-2", "schedule.warmup_steps=2"]
RUNS: dict[str, list[str]] = {
    "zero2 bf16": ["engine.zero_stage=2", "engine.precision=bf16"],
    "zero1 bf16": ["engine.zero_stage=1", "engine.precision=bf16"],
    "zero2 fp32": ["engine.zero_stage=2"],
    "zero1 fp32 frozen": ["engine.zero_stage=1"],
    "zero0 fp32": ["engine.zero_stage=0"],
    "zero0 bf16": ["engine.zero_stage=0", "engine.precision=bf16", "engine.gradient_accumulation_dtype=bf16"],
}
ON_ONE = ("zero2 bf16", "zero2 fp32", "zero0 fp32")
STEP = 4
RANK1 = "zero_pp_rank_1_mp_rank_00_optim_states.pt"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


def _settings(name: str, run_dir: Path) -> list[str]:
    return [*COMMON, *RUNS[name], f"run.dir={run_dir}"]


def _train(ranks: int, runs: dict[str, Path]) -> None:
    tasks = [
        {"config": str(DEMO), "overrides": _settings(name, path), "frozen": ["norm.bias"] if "frozen" in name else []}
        for name, path in runs.items()
    ]
    words = worker(ranks, "foreign.py", json.dumps(tasks))
    done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def _adopt(source: Path, run_dir: Path, *words: str, trust: bool = True) -> int:
    flag = ["--trust-pickles"] if trust else []
    return cli.main(["checkpoint", "adopt", str(source), str(run_dir), *flag, *words])


def _adopt_new(name: str, source: Path, run_dir: Path, *words: str) -> int:
    return _adopt(source, run_dir, "--config", str(DEMO), *_settings(name, run_dir), *words)


def _state(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    with SavedState(run_dir / "checkpoints" / f"step_{step}") as saved:
        return {key: saved.whole(key) for key in saved.shapes} | {"adam": torch.tensor(saved.adam_steps)}


def _losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_metrics(run_dir / "metrics.jsonl") if row["step"] > STEP]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs of two ranks over 8 steps, with DeepSpeed's files of steps 4 and 8."""
    folder = tmp_path_factory.mktemp("undisturbed")
    runs = {name: folder / name.replace(" ", "_") for name in RUNS}
    _train(2, runs)
    return runs


@pytest.fixture(scope="module")
def sources(undisturbed: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """DeepSpeed's files of step 4 alone, as a stranger would hand them over."""
    folder = tmp_path_factory.mktemp("foreign")
    made = {}
    for name, run in undisturbed.items():
        made[name] = folder / name.replace(" ", "_")
        shutil.copytree(run / "checkpoints" / f"step_{STEP}" / "deepspeed", made[name] / "global_step4")
        (made[name] / "latest").write_text("global_step4\n")
    return made


@pytest.fixture(scope="module")
def resumed(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Path]]:
    """Every source adopted into fresh run directories, which went on with two ranks and with one."""
    made: dict[int, dict[str, Path]] = {}
    for ranks, names in ((2, tuple(RUNS)), (1, ON_ONE)):
        folder = tmp_path_factory.mktemp(f"on_{ranks}")
        made[ranks] = {name: folder / name.replace(" ", "_") for name in names}
        for name, path in made[ranks].items():
            assert _adopt_new(name, sources[name], path) == 0
        _train(ranks, made[ranks])
    return made


@pytest.mark.parametrize("name", RUNS)
def test_an_adopted_run_goes_on_bit_for_bit(undisturbed: dict[str, Path], resumed: dict[int, Any], name: str) -> None:
    former, now = undisturbed[name], resumed[2][name]
    for step in (STEP, 2 * STEP):
        expected, found = _state(former, step), _state(now, step)
        assert expected.keys() == found.keys()
        for key, tensor in expected.items():
            assert tensor.dtype == found[key].dtype
            assert torch.equal(tensor, found[key]), (step, key)
    assert _losses(now) == _losses(former)


@pytest.mark.parametrize("name", ON_ONE)
def test_an_adopted_run_goes_on_with_another_number_of_ranks(
    undisturbed: dict[str, Path], resumed: dict[int, Any], name: str
) -> None:
    bound = 1e-2 if "bf16" in name else 1e-6  # as in the parity tests
    assert _losses(resumed[1][name]) == pytest.approx(_losses(undisturbed[name]), rel=bound)


def test_what_is_left_says_where_it_is_from(resumed: dict[int, Any], sources: dict[str, Path]) -> None:
    run = resumed[2]["zero2 bf16"]
    adopted, *others = [row for row in read_lines(run / "events.jsonl") if row["event"] in ("adopted", "resumed")]
    assert (adopted["step"], adopted["world_size"], adopted["adam_steps"]) == (STEP, 2, STEP)
    assert adopted["source"] == str(sources["zero2 bf16"].resolve())
    assert [row["step"] for row in others] == [STEP]
    (found,) = [c for c in list_checkpoints(run) if c.step == STEP]
    trainer = found.trainer()
    assert found.kind == "permanent"
    assert (trainer.samples, trainer.world_size, trainer.micro_batch, trainer.accumulation) == (32, 2, 4, 1)


def test_list_and_verify_tell_kind_size_age_and_bytes_read(
    undisturbed: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = undisturbed["zero2 bf16"]
    assert cli.main(["checkpoint", "list", str(run), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["checkpoints"]
    assert [(row["step"], row["kind"], row["problem"]) for row in rows] == [(4, "permanent", None), (8, "permanent", None)]
    on_disk = [
        sum(p.stat().st_size for p in Path(row["path"]).rglob("*") if p.is_file() and p.name != "manifest.json") for row in rows
    ]
    assert [row["bytes"] for row in rows] == on_disk
    assert 0 < time.time() - rows[0]["time"] < 3600
    assert cli.main(["checkpoint", "verify", str(run), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)
    assert (verified["ok"], verified["bytes"]) == (True, sum(on_disk))
    assert cli.main(["checkpoint", "list", str(run)]) == 0
    assert "permanent" in capsys.readouterr().out


def _elastic(content: dict[str, Any]) -> None:
    """As DeepSpeed writes under `elastic_checkpoint`: a list by group."""
    state = content["optimizer_state_dict"]
    state["base_optimizer_state"] = list(state["base_optimizer_state"]["state"].values())


def _counted_by_group(content: dict[str, Any]) -> None:
    """As optimizers write that count updates by group, such as DeepSpeed's fused Adam."""
    base = content["optimizer_state_dict"]["base_optimizer_state"]
    for group in base["param_groups"]:
        group["step"] = int(base["state"][group["params"][0]].pop("step"))


@pytest.mark.parametrize("form", [_elastic, _counted_by_group])
def test_other_forms_of_the_same_state(sources: dict[str, Path], tmp_path: Path, form: Any) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["zero2 bf16"] / "global_step4", source)
    assert _adopt_new("zero2 bf16", source, tmp_path / "plain") == 0
    for path in source.glob("*_optim_states.pt"):
        _edit(path, form)
    assert _adopt_new("zero2 bf16", source, tmp_path / "other") == 0
    expected, found = _state(tmp_path / "plain", STEP), _state(tmp_path / "other", STEP)
    assert all(torch.equal(tensor, found[key]) for key, tensor in expected.items())


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    line = capsys.readouterr().err.strip()
    assert "\n" not in line
    return line


def _refused(capsys: pytest.CaptureFixture[str], source: Path, run_dir: Path, *words: str, name: str = "zero2 bf16") -> str:
    """The one line of a refusal that has left nothing."""
    assert _adopt_new(name, source, run_dir, *words) in (1, 2)
    assert not run_dir.exists(), "nothing is left behind"
    return _said(capsys)


def test_pickles_are_not_read_unasked(sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _adopt(sources["zero2 bf16"], tmp_path / "run", trust=False) == 2
    assert "--trust-pickles" in _said(capsys)
    assert not (tmp_path / "run").exists()


class _Trap:
    """Runs a command when it is unpickled without care."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("file", [MODEL_FILE, f"bf16_{RANK1}"])
def test_a_pickle_that_would_run_code_does_not(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(sources["zero2 bf16"] / "global_step4", source)
    marker = tmp_path / "marker"
    content = torch.load(source / file, weights_only=False)
    torch.save({**content, "lr_scheduler": _Trap(f"touch {marker}")}, source / file)
    line = _refused(capsys, source, tmp_path / "run")
    assert file in line
    assert "system" in line
    assert not marker.exists()
    torch.load(source / file, weights_only=False)
    assert marker.exists(), "the trap works: a plain reader would have stepped into it"


def _edit(path: Path, change: Any) -> None:
    content = torch.load(path, weights_only=False)
    change(content)
    torch.save(content, path)


def _truncate(source: Path) -> None:
    path = source / f"bf16_{RANK1}"
    path.write_bytes(path.read_bytes()[:-200])


def _exchange_ranks(source: Path) -> None:
    first, second = (source / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1))
    first.rename(source / "aside")
    second.rename(first)
    (source / "aside").rename(second)


def _forget_a_parameter(source: Path) -> None:
    _edit(source / f"bf16_{RANK1}", lambda content: content["optimizer_state_dict"]["param_slice_mappings"][1].pop("norm.bias"))


def _another_count(source: Path) -> None:
    state = "optimizer_state_dict", "base_optimizer_state", "state"
    _edit(source / f"bf16_{RANK1}", lambda content: content[state[0]][state[1]][state[2]][0]["step"].fill_(3))


DAMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "a missing rank": (lambda s: (s / f"bf16_{RANK1}").unlink(), ("rank 1", RANK1, "is missing")),
    "another world size": (
        lambda s: shutil.copy(s / f"bf16_{RANK1}", s / f"bf16_{RANK1.replace('1', '2', 1)}"),
        ("saved by 2 ranks", "partitions of 3", "another world size"),
    ),
    "a rank twice": (lambda s: shutil.copy(s / f"bf16_{RANK1}", s / RANK1), (RANK1, "of the same rank")),
    "another save's model": (lambda s: _edit(s / MODEL_FILE, lambda c: c["module"]["first.weight"].add_(1)), ("first.weight",)),
    "ranks exchanged": (_exchange_ranks, ("zero_pp_rank_0", "not of one save")),
    "a hole": (_forget_a_parameter, ("norm.bias", "not of one save")),
    "another count of updates": (_another_count, (RANK1, "updates of Adam")),
    "no model file": (lambda s: (s / MODEL_FILE).unlink(), (MODEL_FILE,)),
    "truncated": (_truncate, (RANK1, "damaged")),
    "no moments": (lambda s: _edit(s / f"bf16_{RANK1}", lambda c: c.pop("optimizer_state_dict")), (RANK1,)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_source_is_refused_by_the_file(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    change, words = DAMAGES[damage]
    source = tmp_path / "source"
    shutil.copytree(sources["zero2 bf16"] / "global_step4", source)
    change(source)
    line = _refused(capsys, source, tmp_path / "run")
    assert all(word in line for word in words), line


def test_a_configuration_that_does_not_fit_is_refused(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, run = sources["zero2 bf16"], tmp_path / "run"
    assert "train.global_batch=16" in _refused(capsys, source, run, "train.global_batch=16")
    assert "train.max_steps=3" in _refused(capsys, source, run, "train.max_steps=3")
    assert "updates of Adam" in _refused(capsys, source, run, "--step", "2")
    assert "data.exclude" in _refused(capsys, source, run, "data.exclude=gone.jsonl")
    assert "no mp_rank_00" in _refused(capsys, tmp_path, run)


def test_a_run_that_is_further_is_left_alone(
    sources: dict[str, Path], undisturbed: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(undisturbed["zero2 bf16"], run)
    before = {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()}
    assert _adopt(sources["zero2 bf16"], run) == 1
    assert "has a checkpoint of step 8 already" in _said(capsys)
    assert {p: p.read_bytes() for p in (run / "checkpoints").rglob("*") if p.is_file()} == before


def test_an_existing_run_directory_brings_its_own_configuration(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert _adopt(sources["zero2 bf16"], run) == 2
    assert "config.yaml is missing" in _said(capsys)
    assert _adopt_new("zero2 bf16", sources["zero2 bf16"], run) == 0
    shutil.rmtree(run / "checkpoints")
    capsys.readouterr()
    assert _adopt(sources["zero2 bf16"], run, "--step", "5", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["step"], told["samples"], told["adam_steps"], told["world_size"]) == (5, 40, 4, 2)
    assert [c.step for c in list_checkpoints(run)] == [5]


def test_names_that_cannot_be_told_apart_are_not_guessed(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ZeRO 0 in fp32 saves no names: where groups and shapes leave a choice, none is taken."""
    source = tmp_path / "source"
    shutil.copytree(sources["zero0 fp32"] / "global_step4", source)

    def regroup(content: dict[str, Any]) -> None:
        first, second = content["optimizer"]["param_groups"]
        first["params"], second["params"] = [0, 1, 2], [3, 4, 5]

    _edit(source / MODEL_FILE, regroup)
    assert "which parameter is which" in _refused(capsys, source, tmp_path / "run", name="zero0 fp32")
