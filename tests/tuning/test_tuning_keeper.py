"""The keeper of a study: who is handed which trial, what is learned, what a lost worker or keeper leaves."""

import contextlib
import io
import json
import math
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState
from optuna_dashboard import wsgi

from swiftv2.config.load import build
from swiftv2.config.tune import TuneConfig
from swiftv2.engine.lease import Lease, _write, this_process
from swiftv2.errors import SwiftError, UsageError
from swiftv2.tuning.desk import Direct
from swiftv2.tuning.folder import StudyFolder
from swiftv2.tuning.keeper import Asker, Keeper

SPACE = {
    "optimizer.lr": {"kind": "float", "low": 1e-5, "high": 1e-1, "log": True},
    "head.kind": {"kind": "categorical", "choices": ["linear", "mlp"]},
    "head.hidden": {"kind": "int", "low": 8, "high": 64, "step": 8, "when": {"head.kind": "mlp"}},
    "optimizer.betas": {"kind": "categorical", "choices": [[0.9, 0.98], [0.9, 0.999]]},
}


def config(folder: Path, **values: Any) -> TuneConfig:
    tree = {"name": "study", "folder": str(folder), "finetune": "full", "space": SPACE, "trials": 6, **values}
    made = build(TuneConfig, tree, "study.yaml")
    StudyFolder(folder).make()
    return made


@pytest.fixture
def keepers() -> Iterator[list[Keeper]]:
    made: list[Keeper] = []
    yield made
    for keeper in made:
        keeper.close()


def asker(name: str = "a", trials: int = 6) -> Asker:
    return Asker(name, this_process(0), trials)


def claimed(keeper: Keeper, number: int) -> Lease:
    folder = keeper.folder.claim(number)
    folder.mkdir(parents=True, exist_ok=True)
    return Lease.acquire(folder, 1)


def test_a_study_hands_out_as_many_trials_as_it_wants_then_waits_then_is_done_and_grows(
    tmp_path: Path, keepers: list[Keeper]
) -> None:
    keeper = Keeper(config(tmp_path / "study"), 100)
    keepers.append(keeper)
    for number in range(6):
        task = keeper.ask(asker(f"w{number}"))
        assert (task.kind, task.number) == ("trial", number)
        assert ("head.hidden" in task.values) == (task.values["head.kind"] == "mlp")
        assert task.values["optimizer.betas"] in ([0.9, 0.98], [0.9, 0.999])
    assert keeper.ask(asker("late")).kind == "wait"
    for number in range(6):
        keeper.tell(number, "complete", float(number), None)
    assert keeper.ask(asker()).kind == "done"
    assert keeper.ask(asker(trials=7))[:2] == ("trial", 6)


def test_a_study_whose_end_was_begun_draws_nothing_for_a_worker_that_wants_more(tmp_path: Path, keepers: list[Keeper]) -> None:
    """Of a server's study any worker may ask while another ends it, and of a file's whoever keeps it next."""
    keeper = Keeper(config(tmp_path / "study", trials=2), 100)
    keepers.append(keeper)
    for number in range(2):
        keeper.ask(asker(trials=2))
        keeper.tell(number, "complete", float(number), None)
    (keeper.folder.path / "finish.json").write_text("{}")
    with pytest.raises(UsageError, match="grows no more"):
        Direct(keeper).ask(asker(trials=3))
    assert len(keeper.trials()) == 2
    assert keeper.ask(asker(trials=2)).kind == "done"


def test_a_trial_whose_worker_was_lost_is_handed_out_again_as_it_was_and_not_for_ever(
    tmp_path: Path, keepers: list[Keeper]
) -> None:
    keeper = Keeper(config(tmp_path / "study", retries=1), 100)
    keepers.append(keeper)
    first = keeper.ask(asker())
    with claimed(keeper, 0):
        assert keeper.ask(asker("b")).number == 1
    # Given back: no loss.
    assert keeper.ask(asker()) == first
    for losses in (1, 2):
        lease = claimed(keeper, 0)
        lease._done.set()
        lease._thread.join()
        # Its process is gone: another's number and start stand in the file.
        gone = replace(lease.holder, pid=2**22 + losses, started=f"{lease.holder.started.partition('/')[0]}/1")
        _write(lease.path, gone)
        again = keeper.ask(asker())
        if losses == 1:
            assert again == first
            assert keeper.table()[0]["losses"] == 1
    assert again.number == 2
    row = keeper.table()[0]
    assert (row["state"], row["losses"]) == ("failed", 2)
    assert "lost 2 times" in row["reason"]


def test_a_keeper_that_takes_over_finishes_a_draw_and_draws_no_settings_twice(tmp_path: Path, keepers: list[Keeper]) -> None:
    study = config(tmp_path / "study", trials=40)
    values = []
    for number in range(8):
        keeper = Keeper(study, 100)  # Each of them lost after one answer.
        keepers.append(keeper)
        values.append(keeper.ask(Asker(f"w{number}", this_process(0), 40)).values)
        keeper.tell(number, "complete", float(number), None)
    assert len({value["optimizer.lr"] for value in values}) == 8

    half = Keeper(study, 100)
    keepers.append(half)
    trial = half.study.ask()
    rate = trial.suggest_float("optimizer.lr", 1e-5, 1e-1, log=True)
    after = Keeper(study, 100)
    keepers.append(after)
    task = after.ask(Asker("b", this_process(0), 40))
    assert (task.number, task.values["optimizer.lr"]) == (8, rate)
    assert "head.kind" in task.values


def test_the_same_seed_draws_the_same_study(tmp_path: Path, keepers: list[Keeper]) -> None:
    drawn = []
    for name, seed in (("one", 3), ("two", 3), ("three", 4)):
        keeper = Keeper(config(tmp_path / name, seed=seed, sampler={"startup_trials": 2}), 100)
        keepers.append(keeper)
        values = []
        for number in range(6):
            values.append(dict(keeper.ask(asker()).values))
            keeper.tell(number, "complete", abs(number - 2.5), None)
        drawn.append(values)
    assert drawn[0] == drawn[1]
    assert drawn[0] != drawn[2]


def test_the_sampler_learns(tmp_path: Path, keepers: list[Keeper]) -> None:
    """Of 40 draws, the later ones lie nearer to the best rate than chance: the mean distance of chance is 1 decade."""
    keeper = Keeper(config(tmp_path / "study", trials=40), 100)
    keepers.append(keeper)
    distances = []
    for number in range(40):
        rate = keeper.ask(asker(trials=40)).values["optimizer.lr"]
        distances.append(abs(math.log10(rate) + 3))
        keeper.tell(number, "complete", distances[-1], None)
    assert sum(distances[20:]) / 20 < 0.6 * sum(distances[:10]) / 10


def test_a_trial_that_is_worse_than_the_others_at_the_same_step_is_ended_early_even_if_asked_again(
    tmp_path: Path, keepers: list[Keeper]
) -> None:
    keeper = Keeper(config(tmp_path / "study", pruner={"kind": "median", "startup_trials": 3, "warmup_steps": 2}), 100)
    keepers.append(keeper)
    for number in range(3):
        keeper.ask(asker())
        assert not keeper.report(number, [(2, 1.0), (4, 0.5 + 0.1 * number)])
        keeper.tell(number, "complete", 0.5 + 0.1 * number, None)
    keeper.ask(asker())
    assert not keeper.report(3, [(1, 9.0)]), "within the warm-up"
    assert keeper.report(3, [(4, 2.0)])
    assert keeper.report(3, []), "its worker was lost before it could end it"
    keeper.tell(3, "pruned", None, None)
    keeper.tell(3, "pruned", None, None)
    assert keeper.trials()[3].state == TrialState.PRUNED
    keeper.ask(asker())
    assert not keeper.report(4, [(4, 0.4)])


@pytest.mark.parametrize("kind", ["halving", "hyperband", "percentile", "none"])
def test_every_pruner_takes_values_and_spares_the_best(tmp_path: Path, keepers: list[Keeper], kind: str) -> None:
    pruner = {"kind": kind, "min_steps": 2, "startup_trials": 2}
    keeper = Keeper(config(tmp_path / "study", trials=8, pruner=pruner, sampler={"kind": "random"}), 8)
    keepers.append(keeper)
    ended = 0
    for number in range(8):
        keeper.ask(asker(trials=8))
        rows = [(step, 0.1 * number + 1.0 / step) for step in (1, 2, 4, 6)]
        pruned = any(keeper.report(number, [row]) for row in rows)
        keeper.tell(number, "pruned" if pruned else "complete", rows[-1][1], None)
        ended += pruned
        assert not (number == 0 and pruned)
    assert (ended > 0) == (kind != "none")


def test_a_grid_is_tried_once_each_whoever_keeps_it(tmp_path: Path, keepers: list[Keeper]) -> None:
    space = {
        "head.kind": {"kind": "categorical", "choices": ["linear", "mlp"]},
        "head.dropout": {"kind": "float", "low": 0.0, "high": 0.5, "step": 0.25},
    }
    study = config(tmp_path / "study", space=space, sampler={"kind": "grid"})
    seen = set()
    for number in range(6):
        keeper = Keeper(study, 100)
        keepers.append(keeper)
        values = keeper.ask(asker()).values
        seen.add((values["head.kind"], values["head.dropout"]))
        keeper.tell(number, "complete", 1.0, None)
    assert len(seen) == 6


def test_workers_of_a_server_make_no_trial_too_many(tmp_path: Path) -> None:
    """A keeper each, as over a database server; here over a file that one process opens, on a local disk."""
    study = config(tmp_path / "study")
    Keeper(study, 100).close()
    got: list[int] = []

    def work(name: str) -> None:
        keeper = Keeper(study, 100)
        try:
            desk = Direct(keeper)
            while (task := desk.ask(asker(name))).kind != "done":
                if task.kind == "trial":
                    with contextlib.suppress(SwiftError), claimed(keeper, task.number):
                        got.append(task.number)
                        desk.report(task.number, [(1, 1.0)])
                        desk.tell(task.number, "complete", 1.0, None)
        finally:
            keeper.close()

    threads = [threading.Thread(target=work, args=(f"w{index}",)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(got) == list(range(6))
    rows = json.loads((tmp_path / "study" / "status.json").read_text())["trials"]
    assert [(row["number"], row["state"]) for row in rows] == [(number, "complete") for number in range(6)]


def test_the_database_opens_in_the_dashboard(tmp_path: Path, keepers: list[Keeper]) -> None:
    keeper = Keeper(config(tmp_path / "study"), 100)
    keepers.append(keeper)
    keeper.ask(asker())
    keeper.report(0, [(2, 0.7)])
    keeper.tell(0, "complete", 0.5, None)
    app = wsgi(f"sqlite:///{tmp_path / 'study' / 'study.sqlite'}")
    told: list[str] = []

    def get(path: str) -> Any:
        environ = {
            "REQUEST_METHOD": "GET",
            "PATH_INFO": path,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "QUERY_STRING": "",
            "wsgi.input": io.BytesIO(),
            "wsgi.errors": io.StringIO(),
            "wsgi.url_scheme": "http",
        }
        return json.loads(b"".join(app(environ, lambda status, _headers, *_rest: told.append(status))))

    (summary,) = get("/api/studies")["study_summaries"]
    assert summary["study_name"] == "study"
    trials = get(f"/api/studies/{summary['study_id']}")["trials"]
    assert [(trial["state"], trial["values"]) for trial in trials] == [("Complete", [0.5])]
    assert set(told) == {"200 OK"}
