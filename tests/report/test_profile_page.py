"""The page of a profile, made by real ranks, and looked at in a real browser."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import tostring

import pytest
from ranks import swiftv2_run
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from swiftv2.errors import SwiftError
from swiftv2.records import read_metrics
from swiftv2.report.profile import profile_section, sentence, slowdown, write_page
from swiftv2.report.run.reading import read_run

pytestmark = pytest.mark.slow

CONFIG = """
data:
  normalisation: {kind: per_voxel}
  split: {fractions: [0.5, 0.5, 0.0]}
clip: {frames: 8, stride_between: 0.5}
model:
  name: tiny
  image_size: [10, 18, 10]
  frames: 8
  embed_dim: 16
  depths: [2, 2]
  num_heads: [2, 4]
  patch_size: [2, 3, 2, 2]
  drop_path: 0.1
  checkpoint_stages: [1]
mask: {patch_size: [2, 3, 2, 2]}
optimizer: {lr: 2e-3}
schedule: {warmup_steps: 2}
engine: {backend: plain, precision: fp32, device: cpu}
train: {max_steps: 5, global_batch: 4, save_every: 5, evaluate_every: 5}
"""


def _pretrain(folder: Path, store: Path, *words: str, ranks: int) -> Path:
    (folder / "tiny.yaml").write_text(CONFIG, encoding="utf-8")
    run = folder / "run"
    done = swiftv2_run(["pretrain", str(folder / "tiny.yaml"), f"data.store={store}", f"run.dir={run}", *words], ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    assert ("profile of steps 3 to 4" in done.stderr) == bool(words)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, real_store: Path) -> Path:
    """Two ranks, steps 3 and 4 profiled."""
    return _pretrain(tmp_path_factory.mktemp("profiled"), real_store, "train.profile=steps:3-4", ranks=2)


def _summary(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "profile" / "attempt_1" / "summary.json").read_text(encoding="utf-8"))
    return value


def test_two_ranks_are_profiled_with_each_stage_forward_and_backward(run: Path, real_store: Path, tmp_path: Path) -> None:
    folder = run / "profile" / "attempt_1"
    names = {"index.html", "summary.json", "trace-rank-0.json.gz", "trace-rank-1.json.gz"}
    assert {path.name for path in folder.iterdir()} == names
    summary = _summary(run)
    assert (list(summary["ranks"]), summary["world_size"], summary["problems"]) == (["0", "1"], 2, [])
    for told in summary["ranks"].values():
        assert told["steps"] == [3, 4]
        ranges = {(cell["range"][-1], cell["direction"]) for cell in told["cells"] if cell["range"]}
        for name in ("patch embedding", "stage 1", "stage 2", "merging 1", "decoder", "masked model (loss)"):
            assert {(name, "forward"), (name, "backward")} <= ranges, name
        assert ("objective (normalising, scattering)", "forward") in ranges
        phases = {cell["phase"] for cell in told["cells"] if cell["cpu"] > 0}
        assert {"data", "forward", "backward", "communication", "optimizer"} <= phases
    other = _pretrain(tmp_path, real_store, ranks=2)
    losses = [[row["loss"] for row in read_metrics(path / "metrics.jsonl")] for path in (run, other)]
    assert losses[0] == losses[1]


def test_what_the_page_says_is_what_the_summary_holds(run: Path) -> None:
    summary = _summary(run)
    cells = summary["ranks"]["0"]["cells"]
    total = sum(cell["cpu"] for cell in cells)
    own: dict[str, float] = {}
    for cell in cells:
        if cell["range"]:
            own[cell["range"][-1]] = own.get(cell["range"][-1], 0.0) + cell["cpu"]
    longest = max(own, key=lambda name: own[name])
    said = sentence(summary)
    before, found, _ = said.partition(f" % of a step is in {longest}, forward and backward, where ")
    assert found
    share = float(before.rpartition(" ")[2])
    assert share == pytest.approx(100 * own[longest] / total, abs=0.6)
    ratio, compared = slowdown(summary)
    assert 0.2 < ratio < 20
    assert f"{ratio:.2f} times" in compared
    page = (run / "profile" / "attempt_1" / "index.html").read_text(encoding="utf-8")
    assert "http" not in page.replace("https://ui.perfetto.dev", "").replace("http-equiv", "")
    assert said in page.replace("\N{NO-BREAK SPACE}", " ")


def test_what_takes_longest_is_told_first(run: Path) -> None:
    summary = _summary(run)
    for cell in summary["ranks"]["0"]["cells"]:
        cell["cpu"] = {"communication": 9.0, "data": 2.0}.get(cell["phase"], 0.01)
    summary["ranks"]["0"]["seconds"] = sum(cell["cpu"] for cell in summary["ranks"]["0"]["cells"])
    said = sentence(summary)
    assert said.startswith("Communication is ")
    assert said.index("waiting for data") < said.index("of a step is in ")


def test_the_report_tells_of_the_newest_profile(run: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints"))
    shutil.copytree(copy / "profile" / "attempt_1", copy / "profile" / "attempt_10")
    section = profile_section(read_run(copy))
    assert section is not None
    text = tostring(section, encoding="unicode", method="text")
    assert "profile/attempt_10/index.html" in text
    assert sentence(_summary(copy)) in text.replace("\N{NO-BREAK SPACE}", " ")
    (copy / "profile" / "attempt_10" / "summary.json").write_text('{"ranks": {}}', encoding="utf-8")
    damaged = profile_section(read_run(copy))
    assert damaged is not None
    assert "cannot be read" in tostring(damaged, encoding="unicode", method="text")
    shutil.rmtree(copy / "profile")
    assert profile_section(read_run(copy)) is None


@pytest.mark.parametrize("text", ['{"ranks": {}}', '{"ranks": {"0": {}}}', '{"ranks": []}', "[]", ""])
def test_a_damaged_summary_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    with pytest.raises(SwiftError, match=r"summary\.json"):
        write_page(tmp_path)
    assert not (tmp_path / "index.html").exists()


def test_a_gpu_is_told_by_its_kernels(run: Path, tmp_path: Path) -> None:
    """A summary as of CUDA: shares are of the kernels' time, and an idle device is spoken of."""
    summary = _summary(run)
    for cell in summary["ranks"]["0"]["cells"]:
        cell["device"] = 3.0 if cell["range"][-1:] == ["stage 2"] and cell["kind"] == "matrix products" else 0.0
    kernels = [{"name": "gemm", "kind": "matrix products", "count": 8, "seconds": 6.0}]
    device = {"seconds": 10.0, "busy": 6.0, "idle": 4.0, "long_gaps": 7, "long_gap_seconds": 3.0, "kernels": kernels}
    summary["ranks"]["0"]["device"] = device
    said = sentence(summary)
    assert said.startswith("The GPU computes 60 % of the time; 100 % of that is in stage 2, forward and backward")
    (tmp_path / "summary.json").write_text(json.dumps(summary), encoding="utf-8")
    page = write_page(tmp_path).read_text(encoding="utf-8")
    assert "it stands still for 40 %, of which 75 % in 7 gaps" in page
    assert "The GPU stands still for more than a fifth of the time" in page


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """A headless Chromium without network."""
    found, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if found is None or driver is None:
        pytest.skip("no Chromium here")
    options = Options()
    options.binary_location = found
    for word in ("--headless=new", "--no-sandbox", "--window-size=390,800", "--host-resolver-rules=MAP * ~NOTFOUND"):
        options.add_argument(word)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    opened = webdriver.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone_and_its_tables_sort(run: Path, browser: webdriver.Chrome, scheme: str) -> None:
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    size = {"width": 390, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((run / "profile" / "attempt_1" / "index.html").as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    paper = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (scheme == "light")
    widths = browser.execute_script(
        "return [...document.querySelectorAll('.profile-bar')].map(b => [...b.children].reduce((w, s) => w + s.offsetWidth, 0))"
    )
    assert len(widths) > 8
    # Of the longest; a share of a thousandth has no pixel of its own.
    assert 100 < max(widths) <= 390
    script = """
        const table = [...document.querySelectorAll('[aria-label="Operators that take longest"] table')][0];
        table.querySelectorAll('th button')[2].click();
        return [...table.tBodies[0].rows].map(row => Number(row.cells[2].dataset.value));
    """
    calls = browser.execute_script(script)
    assert len(calls) > 10
    assert calls == sorted(calls)
    assert browser.get_log("browser") == []  # type: ignore[no-untyped-call]
