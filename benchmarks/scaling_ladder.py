"""From a ladder to a law to the next model, on this machine, through `sweep submit` on a Slurm of this host.

    python benchmarks/scaling_ladder.py --folder FOLDER --out benchmarks/results/2026-11-22-scaling-ladder.md

Tiny Swin4D on a generated cohort: rates over four widths in both parametrisations; four widths x three budgets under muP and
in the standard form; both fitted; the loss of a larger model trained longer is predicted and written down; then it is trained.
As root, with Slurm's Debian packages. Half an hour on two quiet cores; the same folder goes on where it stands.
"""

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from machine import ROOT, environment, page, parser, prose, table, write_page

sys.path.insert(0, str(ROOT / "tests" / "slurm"))
from cluster import Cluster, remove

PACKAGES = ("torch", "deepspeed", "zarr", "numpy", "scipy")
SALT = "5d41402abc4b2a76b9719d911017c592"
FORMS = ("mup", "standard")
NEXT = {"name": "w192", "set": ["model.embed_dim=192"]}
NEXT_TOKENS = 614400
LIMIT = 7200.0


class Bench:
    """The folder in which everything lies, and the commands that fill it."""

    def __init__(self, folder: Path, cluster: Cluster) -> None:
        self.folder, self.cluster = folder, cluster
        self.store = folder / "cohort.zarr"

    def swiftv2(self, *words: str) -> Any:
        """The JSON of a command."""
        here = {
            "PYTHONPATH": str(ROOT),
            "SWIFTV2_ROOT": str(ROOT),
            "SWIFTV2_PYTHON": sys.executable,
            "SWIFTV2_SITE": "local",
            "SWIFTV2_DOCTOR": "off",
            "OMP_NUM_THREADS": "1",
            "SBATCH_CONSTRAINT": "",
            "SBATCH_GPUS_PER_NODE": "1",  # Several elements fit on a node then.
        }
        done = self.cluster.run(
            sys.executable, "-m", "swiftv2", *words, "--json", env=here, folder=self.folder, seconds=300, check=False
        )
        if done.returncode:
            raise SystemExit(f"swiftv2 {' '.join(words)}: {done.stderr}")
        return json.loads(done.stdout)

    def make_store(self) -> None:
        """The cohort of configs/synth/tiny.yaml."""
        if self.store.exists():
            return
        bids = self.folder / "bids"
        given = ("--cohort", "generated", "--salt", SALT, "grid.voxel_mm=6")
        for words in (
            ("synth", str(bids), "--config", str(ROOT / "configs/synth/tiny.yaml")),
            ("build", str(bids), str(self.store), *given),
        ):
            done = [sys.executable, "-m", "swiftv2", "store", *words]
            subprocess.run(done, env=environment(), check=True, stdout=sys.stderr)

    def ladder(self, name: str, source: str, **changes: Any) -> list[dict[str, Any]]:
        """Run a ladder of scaling/ladders to its end, with other sizes or budgets where they are given; its rows."""
        tree = yaml.safe_load((ROOT / f"scaling/ladders/{source}.yaml").read_text())
        tree |= {"folder": str(self.folder / "runs" / name), **changes}
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(tree, sort_keys=False))
        words = (str(path), f"data.store={self.store}")
        end = time.monotonic() + LIMIT
        self.swiftv2("sweep", "submit", *words)
        while True:
            counts = self.swiftv2("sweep", "status", str(path))["counts"]
            sys.stderr.write(f"{name}: {counts}\n")
            if not counts.keys() - {"finished"}:
                break
            if time.monotonic() > end or counts.get("failed"):
                raise SystemExit(f"{name}: {counts}; see {tree['folder']}")
            time.sleep(10)
        self.swiftv2("sweep", "collect", str(path), "--out", str(self.folder / "tables" / name))
        rows = json.loads((self.folder / "tables" / name / "table.json").read_text())
        return list(rows["rows"] if isinstance(rows, dict) else rows)

    def law(self, form: str) -> dict[str, Any]:
        """The law of a form's ladder; `refused` where the table tells none."""
        folder = self.folder / "laws" / form
        source = self.folder / "tables" / form / "table.csv"
        words = ("--parameters", "parameters", "--tokens", "tokens", "--compute", "flops", "--loss", "loss")
        fit: dict[str, Any] = self.swiftv2("sweep", "fit", str(source), *words, "--out", str(folder))
        return fit

    def predict(self, form: str, parameters: int) -> dict[str, Any]:
        """What the law says of the next model, before it is trained."""
        where = self.folder / "laws" / form / "fit.json"
        words = ("--parameters", str(parameters), "--tokens", str(NEXT_TOKENS), "--base", "tiny", "--beyond")
        told: dict[str, Any] = self.swiftv2("sweep", "predict", str(where), *words)
        return told


def transfer_lines(bench: Bench) -> list[str]:
    """Losses over rates, and the best rates."""
    told = bench.swiftv2(
        "sweep", "transfer", str(bench.folder / "tables/transfer/table.json"), "--out", str(bench.folder / "transfer")
    )
    rates = told["widths"][0]["lr"]
    heads = ("form", "width", *(f"{rate:g}" for rate in rates), "best rate")
    rows = [
        (one["parametrisation"], str(one["embed_dim"]),
         *("diverged" if loss is None else f"{loss:.4f}" for loss in one["loss"]), f"{one['best_lr']:.2g}")
        for one in told["widths"]
    ]  # fmt: skip
    moved = ", ".join(f"{form} by a factor of {ratio:.2g}" for form, ratio in told["moved"].items())
    lines = ["## Learning rate over widths", "", "Held-out loss after 76,800 tokens by peak rate.", ""]
    return [*lines, *table(heads, rows), *prose(f"From the smallest to the largest width the best rate changed: {moved}.")]


def ladder_lines(form: str, rows: list[dict[str, Any]], fit: dict[str, Any]) -> list[str]:
    """A ladder's table and its law."""
    budgets, widths = (sorted({row[key] for row in rows}) for key in ("tokens", "embed_dim"))
    loss = {(row["embed_dim"], row["tokens"]): row["loss"] for row in rows}
    size = {row["embed_dim"]: row["parameters"] for row in rows}
    heads = ("width", "parameters", *(f"{budget:,} tokens" for budget in budgets))
    body = [(str(w), f"{size[w]:,}", *(f"{loss[w, b]:.4f}" for b in budgets)) for w in widths]
    spread = fit["intervals"]
    constants = ", ".join(
        f"{key} {fit[key]:.4g} [{spread[key][0]:.4g}, {spread[key][1]:.4g}]" for key in ("E", "alpha", "beta")
    )
    lines = [f"## Ladder, {form}", "", *table(heads, body)]
    lines += prose(f"Law, with 90 % intervals: {constants}; robust spread of log residuals {fit['noise']:.2g}.")
    return [*lines, *(f"- {warning}" for warning in fit["warnings"]), ""]


def next_lines(told: dict[str, tuple[dict[str, Any], dict[str, Any], float]]) -> list[str]:
    """What was predicted of the next model, and what it did."""
    heads = ("form", "predicted", "90 % interval", "width of it", "measured", "error", "held", "'the same as the largest'")
    rows = []
    for form, (prediction, row, seen) in told.items():
        low, high = prediction["loss_interval"]
        loss, guess = row["loss"], prediction["loss"]
        rows.append(
            (form, f"{guess:.4f}", f"{low:.4f} to {high:.4f}", f"{100 * (high - low) / guess:.1f} %", f"{loss:.4f}",
             f"{100 * (guess / loss - 1):+.2f} %", "yes" if low <= loss <= high else "NO", f"{100 * (seen / loss - 1):+.2f} %")
        )  # fmt: skip
    return table(heads, rows)


def main(words: Sequence[str] | None = None) -> None:
    """Run it and write the page."""
    asked = parser(__doc__).parse_args(words)
    folder = asked.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    cluster = Cluster(folder / "slurm")
    bench = Bench(folder, cluster)
    bench.make_store()
    body, told = [], {}
    try:
        cluster.up()
        bench.ladder("transfer", "tiny_transfer")
        for form in FORMS:
            rows = bench.ladder(form, f"tiny_{form}")
            fit = bench.law(form)
            body += ladder_lines(form, rows, fit)
            largest = max(rows, key=lambda row: row["flops"])
            plan = bench.swiftv2("plan", "--model", "tiny", *NEXT["set"])
            prediction = bench.predict(form, plan["encoder_parameters"])
            (folder / f"predicted_{form}.json").write_text(json.dumps(prediction, indent=1))
            (row,) = bench.ladder(
                f"next_{form}", f"tiny_{form}", sizes=[NEXT], budgets={"count": "all", "tokens": [NEXT_TOKENS]}
            )
            told[form] = (prediction, row, largest["loss"])
    finally:
        remove(cluster)
    body = [*transfer_lines(bench), *body]
    further = told["mup"][1]["flops"] / max(1.0, told["mup"][0]["extrapolation"]["factor"])
    words_ = (
        f"Width 192, {NEXT_TOKENS:,} tokens, {told['mup'][1]['flops']:.3g} FLOPs, "
        f"{told['mup'][1]['flops'] / further:.1f} times those of the largest run of the ladder. The prediction was written "
        "down before the run was queued."
    )
    body += ["## The next model", *prose(words_), *next_lines(told), ""]
    write_page(page("A ladder, a law, the next model", PACKAGES, body), asked.out)


if __name__ == "__main__":
    main()
