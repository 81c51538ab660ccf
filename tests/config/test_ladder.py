"""What a ladder's file may say, and which runs come of it: names, steps, rates, branches, resources."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from swiftv2.cluster.sweep import resolve
from swiftv2.config.ladder import Facts, LadderConfig, Rung, Variant, is_ladder, load_ladder
from swiftv2.config.load import build, find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError

BASE: dict[str, Any] = {
    "config": "7M",
    "folder": "runs/x",
    "sizes": ["7M", {"name": "w72", "set": ["model.embed_dim=72"], "nodes": 2, "time": "2:00:00"}],
    "budgets": {"tokens": [1e9, "4e9"]},
    "learning_rate": {"rule": "fixed", "rate": 1e-3},
}
LADDERS = sorted((Path(__file__).parents[2] / "scaling" / "ladders").glob("*.yaml"))
FACTS = Facts(parameters=7_000_000, tokens_per_clip=40_960, brain_tokens_per_clip=20_480, flops_per_clip=6e10, global_batch=32)


def ladder(**values: Any) -> LadderConfig:
    return build(LadderConfig, BASE | values, "x.yaml")


def rungs(facts: Facts = FACTS, **values: Any) -> tuple[Rung, ...]:
    return ladder(**values).rungs(lambda _: facts)


def setting(rung: Rung, key: str) -> Any:
    """What an element sets a key to; the last word counts."""
    found = [yaml.safe_load(word.partition("=")[2]) for word in rung.words if word.partition("=")[0] == key]
    return found[-1] if found else None


def checked(rung: Rung) -> PretrainConfig:
    return load(PretrainConfig, find_preset("pretrain", "7M"), (*rung.words, "run.dir=x", "data.store=x"))


# Budgets


@given(
    tokens=st.lists(st.floats(1e9, 1e13), min_size=1, max_size=4, unique_by=lambda value: f"{value:g}"),
    batch=st.integers(1, 512),
    kind=st.sampled_from(["cosine", "trunk"]),
    count=st.sampled_from(["all", "brain"]),
)
def test_every_budget_is_trained_to_within_half_a_step(tokens: list[float], batch: int, kind: str, count: str) -> None:
    facts = FACTS._replace(global_batch=batch)
    a_step = batch * (facts.tokens_per_clip if count == "all" else facts.brain_tokens_per_clip or 0)
    made = rungs(facts, sizes=["7M"], budgets={"count": count, "tokens": tokens, "least_steps": 2}, schedule={"kind": kind})
    ends = [rung for rung in made if rung.role != "trunk"]
    assert [rung.steps * a_step for rung in ends] == pytest.approx(tokens, abs=a_step / 2)
    assert all(setting(rung, "train.max_steps") == rung.steps for rung in made)


def test_budgets_may_be_multiples_of_parameters_or_of_compute() -> None:
    made = rungs(sizes=["7M"], budgets={"tokens_per_parameter": [100], "flops": [1e15], "least_steps": 10})
    assert {rung.name: rung.steps for rung in made} == {
        "7M-r_100": round(100 * 7e6 / (32 * 40_960)),
        "7M-f_1e15": round(1e15 / (32 * 6e10)),
    }


def test_a_size_may_have_budgets_of_its_own() -> None:
    sizes = ["7M", {"name": "large", "set": ["model=51M"], "budgets": {"tokens": [8e9]}}]
    assert [rung.name for rung in rungs(sizes=sizes)] == ["7M-t_1e9", "7M-t_4e9", "large-t_8e9"]


# Trunks and branches


def test_branches_begin_where_their_trunk_keeps_a_checkpoint_and_end_with_their_cooldown() -> None:
    made = rungs(sizes=["7M"], schedule={"kind": "trunk", "warmup": 0.1, "cooldown": 0.25})
    trunk, *branches = made
    assert (trunk.name, trunk.role, trunk.after) == ("7M-trunk", "trunk", ())
    assert checked(trunk).schedule.cooldown_steps == 0
    assert [setting(rung, "run.branch_step") for rung in branches] == setting(trunk, "train.keep_steps")
    assert trunk.steps == max(rung.start for rung in branches), "the trunk does no step that nothing branches from"
    for rung in branches:
        config = checked(rung)
        assert (rung.role, rung.after) == ("branch", ("7M-trunk",))
        assert config.run.branch_from == Path("runs/x/7M-trunk")
        assert (config.run.branch_step or 0) + config.schedule.cooldown_steps == config.train.max_steps == rung.steps
        assert config.schedule.cooldown_steps / rung.steps == pytest.approx(0.25, abs=1 / rung.steps)
        assert config.schedule.kind == "constant"
    warmups = {checked(rung).schedule.warmup_steps for rung in made}
    assert warmups == {round(0.1 * min(rung.steps for rung in branches))}, "one warm-up for all that share a trunk"


def test_a_cosine_ends_where_its_budget_does() -> None:
    for rung in rungs(schedule={"kind": "cosine", "warmup_steps": 7}):
        schedule = checked(rung).schedule
        assert (schedule.kind, schedule.warmup_steps, rung.start, rung.after) == ("cosine", 7, 0, ())


# Rates and parametrisations


def test_rates_follow_their_rule() -> None:
    power = {"rule": "power", "rate": 1e-3, "parameters": 1.75e6, "exponent": 0.5}
    assert {checked(rung).optimizer.lr for rung in rungs(learning_rate=power)} == {5e-4}
    made = rungs(learning_rate={"rule": "mup", "rate": "2e-3"}, sizes=["51M"])
    for rung in made:
        config = checked(rung)
        assert (config.optimizer.lr, config.model.parametrisation, config.model.base_embed_dim) == (2e-3, "mup", 36)
    grid = rungs(
        learning_rate={"rule": "grid", "rates": [3e-4, 1e-3]},
        parametrisations=["standard", "mup"],
        base_embed_dim=72,
        sizes=[BASE["sizes"][1]],
        budgets={"tokens": [1e9]},
    )
    assert [rung.name for rung in grid] == [
        "w72-standard-lr_0.0003-t_1e9",
        "w72-standard-lr_0.001-t_1e9",
        "w72-mup-lr_0.0003-t_1e9",
        "w72-mup-lr_0.001-t_1e9",
    ]
    assert [checked(rung).optimizer.lr for rung in grid] == [3e-4, 1e-3, 3e-4, 1e-3]
    assert [checked(rung).model.width_multiplier for rung in grid] == [1.0] * 4


# What else differs


def test_axes_are_multiplied_and_named() -> None:
    axes: dict[str, Any] = {
        "data_fraction": [0.5, 1],
        "mask": [{"ratio": 0.75}, {"ratio": 0.6, "patch": [12, 12, 12, 2]}, {"kind": "tube"}],
        "patch": [[6, 6, 6, 1], [6, 6, 6, 2]],
        "seeds": [3],
    }
    made = rungs(sizes=["7M"], budgets={"tokens": [1e9]}, **axes)
    assert len(made) == 12
    assert made[2].name == "7M-data_0.5-mask_0.6-12x12x12x2-patch_6x6x6x1-seed_3-t_1e9"
    assert len({rung.name for rung in made}) == 12
    config = checked(made[2])
    assert config.data.split.train_share == 0.5
    assert (config.mask.ratio, config.mask.patch_size, config.model.patch_size) == (0.6, (12, 12, 12, 2), (6, 6, 6, 1))
    assert (config.run.seed, config.model.name) == (3, "7M")
    assert checked(made[-1]).mask.kind == "tube"


def test_subjects_are_weighed_against_scan_length() -> None:
    pairs = [{"share": 1.0, "frames_per_run": 120}, {"share": 0.25, "frames_per_run": 480}]
    made = [checked(rung) for rung in rungs(sizes=["7M"], budgets={"tokens": [1e9]}, subjects=pairs)]
    assert [(one.data.split.train_share, one.data.frames_per_run) for one in made] == [(1.0, 120), (0.25, 480)]
    assert made[0].train.max_steps == made[1].train.max_steps


# The sweep that comes of it


def test_the_outline_has_the_names_order_and_resources_of_the_sweep() -> None:
    made = ladder(schedule={"kind": "trunk"}, nodes=1, tasks_per_node=4, time="1:00:00", at_most=3)
    sweep, outline = made.sweep(made.rungs(lambda _: FACTS)), made.outline()
    assert sweep.names() == outline.names()
    assert [run.after for run in sweep.runs()] == [run.after for run in outline.runs()]
    assert made.trunks() == {"7M-trunk", "w72-trunk"}
    assert sweep.resources("7M-t_1e9") == outline.resources("7M-t_1e9") == (1, 4, "1:00:00", 3)
    assert sweep.resources("w72-trunk") == (2, 4, "2:00:00", 3)
    assert sweep.words(1)[-1] == "run.dir=runs/x/7M-t_1e9"


def test_a_ladder_is_told_from_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump(BASE))
    assert is_ladder(path)
    assert load_ladder(path) == ladder()
    path.write_text("config: 7M\nfolder: x\ngrid: {run.seed: [1]}\n")
    assert not is_ladder(path)


@pytest.mark.parametrize("path", LADDERS, ids=lambda path: str(path.stem))
def test_the_shipped_ladders_make_runs_that_are_configured_well(path: Path) -> None:
    made = load_ladder(path)
    assert made.folder == Path("runs") / path.stem

    def facts(variant: Variant) -> Facts:
        config = load(PretrainConfig, find_preset("pretrain", made.config), (*made.common, *variant.words))
        shape = zip((*config.model.image_size, config.clip.frames), config.model.patch_size, strict=True)
        tokens = math.prod(-(-size // patch) for size, patch in shape)
        return Facts(7_000_000, tokens, tokens / 2, 4e11, config.train.global_batch)

    sweep = made.sweep(made.rungs(facts))
    configs = resolve(sweep, ["data.store=cohort.zarr"])
    assert len({config.run.dir for config in configs}) == len(configs) > 1
    assert {config.model.name for config in configs} == {size.name for size in made.sizes}


# What is refused


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"sizes": []}, "sizes takes a list of 1 at least"),
        ({"sizes": [{"name": "a", "sett": []}]}, "sizes.0: unknown key sett; keys here are name, set, budgets"),
        ({"sizes": ["a/b"]}, "cannot name a folder"),
        ({"sizes": ["7M", "7M"]}, "the name 7M is there more than once"),
        ({"sizes": ["7M", {"name": "7M", "budgets": {"tokens": [5e9]}}]}, "the name 7M is there more than once"),
        ({"common": ["model.packing=template"]}, "common: model.packing=template is lost where size 7M sets model=7M"),
        ({"sizes": [{"name": "a", "time": 3600}]}, "takes text"),
        ({"sizes": [{"name": "a", "time": "noon"}]}, "'noon' is no time limit"),
        ({"budgets": {}}, "budgets: give tokens, tokens_per_parameter or flops"),
        ({"budgets": {"tokens": [-1]}}, "takes a number above 0"),
        ({"budgets": {"token": [1]}}, "unknown key token"),
        ({"learning_rate": {"rule": "grid", "rate": 1e-3}}, "learning_rate: rule=grid takes rates"),
        ({"learning_rate": {"rule": "power", "rate": 1e-3}}, "rule=power takes exponent, parameters, rate"),
        ({"learning_rate": {"rule": "mup", "rate": 1e-3}, "parametrisations": ["standard"]}, "rule=mup is of muP alone"),
        ({"base_embed_dim": 12}, "base_embed_dim is muP's"),
        ({"data_fraction": [0.0]}, "take shares above 0 and up to 1"),
        ({"data_fraction": [1], "subjects": [{"share": 1, "frames_per_run": 9}]}, "both choose the training subjects"),
        (
            {"subjects": [{"share": 1, "frames_per_run": 90}, {"share": 0.5, "frames_per_run": 90}]},
            "share x frames_per_run goes from 45 to 90; make it equal",
        ),
        ({"mask": [{}]}, "mask: give ratio, patch or kind"),
        ({"common": ["train.max_steps=5"]}, "train.max_steps=5: train.max_steps is made by the ladder"),
        ({"common": ["schedule={kind: cosine}"]}, "schedule.kind is made by the ladder"),
        ({"sizes": [{"name": "a", "set": ["optimizer.lr=1"]}]}, "optimizer.lr is made by the ladder"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(values: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)) as caught:
        ladder(**values)
    assert str(caught.value).startswith("x.yaml")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "facts", "says"),
    [
        ({"budgets": {"tokens": [1e6]}}, FACTS, "7M-t_1e6: its budget is 1 steps, fewer than budgets.least_steps=50"),
        (
            {"budgets": {"count": "brain", "tokens": [1e9]}},
            FACTS._replace(brain_tokens_per_clip=None),
            "needs the store's masks",
        ),
        ({"schedule": {"warmup_steps": 800}}, FACTS, "warm-up and cooldown take 800 of the 763 steps of its shortest budget"),
        ({"schedule": {"kind": "trunk", "warmup_steps": 700}}, FACTS, "warm-up and cooldown take 853 of the 763 steps"),
    ],
)
def test_budgets_that_come_to_nothing_are_refused(values: dict[str, Any], facts: Facts, says: str) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        rungs(facts, **values)


@pytest.mark.parametrize(
    "word",
    ["train.max_steps=9", "optimizer.lr=1", "schedule.kind=cosine", "model=5M", "mask.ratio=0.9", "run.seed=1", "train={}"],
)
def test_words_for_all_elements_leave_alone_what_the_ladder_makes(word: str) -> None:
    made = ladder(mask=[{"ratio": 0.5}], seeds=[0])
    with pytest.raises(UsageError, match="is made by the ladder"):
        made.check_words([word])
    made.check_words(["data.store=x", "train.global_batch=8", "schedule.final_ratio=0.1"])
