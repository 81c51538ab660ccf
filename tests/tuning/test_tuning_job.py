"""What Slurm's launchers ask of fine-tuning runs, studies and embeddings before their ranks, and what is requeued after."""

import json
from pathlib import Path

import pytest
import yaml

from swiftv2.cli import main
from swiftv2.records import append_line

STUDY = {
    "name": "study",
    "folder": "study",
    "finetune": "full",
    "set": ["encoder.weights=weights"],
    "space": {"optimizer.lr": {"kind": "float", "low": 1e-5, "high": 1e-2, "log": True}},
}


@pytest.fixture(autouse=True)
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name, value in {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0", "SLURM_NTASKS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    return tmp_path


def trial(job: Path, state: str, saves: int) -> None:
    run = job / "study" / "trials" / "trial_0000"
    run.mkdir(parents=True, exist_ok=True)
    for step in range(saves):
        append_line(run / "events.jsonl", {"step": step, "attempt": 1, "event": "saved"})
    (job / "study" / "status.json").write_text(json.dumps({"trials": [{"number": 0, "state": state}]}))


def test_a_study_begins_by_its_folder_and_the_words_of_a_worker(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", "begin", "tune", "study.yaml", "trials=9", "--workers", "4"]) == 0
    assert capsys.readouterr().out.splitlines() == ["study", "0", "tune", "run", "study.yaml", "trials=9", "--workers", "4"]
    trial(job, "running", saves=3)
    assert main(["job", "begin", "tune", "study.yaml"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "3"
    assert main(["job", "begin", "tune", "study.yaml", "trails=9"]) == 2
    assert main(["job", "begin", "tune", "trials=9"]) == 2


@pytest.mark.parametrize(
    ("state", "status", "saves", "verdict"),
    [
        ("complete", 0, 5, 0),
        ("running", 75, 5, 75),  # told to stop, with its state saved
        ("running", 137, 5, 75),  # killed
        ("running", 0, 5, 75),  # what `srun` says where a node was lost
        ("running", 75, 3, 1),  # no further than when it began
        ("running", 1, 5, 1),  # for a person
        ("running", 2, 5, 2),
    ],
)
def test_a_worker_is_requeued_where_another_start_comes_further(
    job: Path, state: str, status: int, saves: int, verdict: int
) -> None:
    trial(job, state, saves)
    assert main(["job", "end", "tune", "study", "--status", str(status), "--mark", "3"]) == verdict


def test_a_worker_is_not_requeued_for_ever(job: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial(job, "running", saves=5)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "2")
    assert main(["job", "end", "tune", "study", "--status", "75", "--mark", "3", "--most", "2"]) == 1


def test_a_fine_tuning_run_is_checked_before_its_ranks(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["job", "begin", "finetune", "full", "encoder.weights=weights", "run.dir=run", "task.data.store=cohort.zarr"]
    assert main(words) == 2
    assert "task.data.store=cohort.zarr is no store" in capsys.readouterr().err
    (job / "cohort.zarr").mkdir()
    (job / "cohort.zarr" / "zarr.json").write_text("{}")
    assert main(words) == 0
    target, mark, verb, config, *rest = capsys.readouterr().out.splitlines()
    assert (target, mark, verb, Path(config).name) == ("run", "0", "finetune", "full.yaml")
    assert rest == words[4:]
    assert main([*words, "train.global_batch=5", "train.micro_batch=2"]) == 2


def test_embeddings_go_on_where_shards_were_finished(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["job", "begin", "embed", "weights", "cohort.zarr", "out", "--tokens"]) == 0
    assert capsys.readouterr().out.splitlines() == ["out", "0", "embed", "weights", "cohort.zarr", "out", "--tokens"]
    assert main(["job", "begin", "embed", "weights"]) == 2
    end = ["job", "end", "embed", "out", "--mark", "0", "--status"]
    assert main([*end, "75"]) == 1
    (job / "out").mkdir()
    (job / "out" / "clips-00000.parquet").write_bytes(b"")
    assert [main([*end, status]) for status in ("75", "0", "1")] == [75, 75, 1]
    (job / "out" / "embeddings.json").write_text("{}")
    assert main([*end, "0"]) == 0
