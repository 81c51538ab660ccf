"""Sizes of a family, the run of a size, and where it fits."""

from pathlib import Path

import numpy as np
import pytest

from swiftv2.config.load import dump, find_preset, load
from swiftv2.config.pretrain import PretrainConfig
from swiftv2.errors import UsageError
from swiftv2.plan import plan_model
from swiftv2.recipes.sizing import Family, configure, near


def family(preset: str, *words: str) -> Family:
    return Family(load(PretrainConfig, find_preset("pretrain", preset), ("data.store=none.zarr", *words)))


@pytest.mark.parametrize(
    ("preset", "step", "gpu_step", "smallest"), [("7M", 6, 48, 6), ("837M_new", 10, 40, 30), ("demo", 3, 24, 3)]
)
def test_widths_divide_into_heads(preset: str, step: int, gpu_step: int, smallest: int) -> None:
    """Rotary embeddings (837M_new) ask for even head dimensions of at least 6, GPUs for multiples of 8."""
    of = family(preset)
    assert (of.step, of.gpu_step, of.smallest) == (step, gpu_step, smallest)
    for width in (smallest, smallest + step, 5 * gpu_step):
        model = of.model(width)
        assert all(width * 2**stage % heads == 0 for stage, heads in enumerate(model.num_heads))
    suited = of.model(3 * gpu_step)
    assert all(suited.embed_dim * 2**stage // heads % 8 == 0 for stage, heads in enumerate(suited.num_heads))
    if smallest > step:
        with pytest.raises(UsageError, match="head dimension"):
            of.model(smallest - step)


@pytest.mark.parametrize("words", [("7M",), ("837M_new",), ("demo", "clip.frames=10"), ("7M", "model.packing=template")])
def test_parameters_and_flops_of_any_width_are_those_that_are_counted(words: tuple[str, ...]) -> None:
    of = family(*words)
    for width in (of.smallest, 7 * of.step, 10 * of.gpu_step):
        counted = plan_model(of.model(width))
        assert float(of.parameters(width)) == pytest.approx(counted.encoder_parameters, rel=1e-9)
        assert float(of.width(counted.encoder_parameters)) == pytest.approx(width, rel=1e-9)
        # Where tokens are left out, which lengths groups are padded to depends a little on the width.
        close = 1e-9 if of.base.model.packing == "none" else 5e-3
        assert float(of.clip_flops(width)) == pytest.approx(of.holdings(width).training_flops, rel=close)
        assert of.flops(width)["total"] == of.holdings(width).training_flops
        assert of.holds(counted.encoder_parameters)
    between = float(of.parameters(9 * of.step + of.step / 2))
    assert not of.holds(between)


def test_sizes_of_the_published_family_keep_their_names() -> None:
    of = family("7M", "model.parametrisation=mup")
    assert [of.model(width).name for width in (36, 96, 192, 384, 768, 240)] == ["7M", "51M", "202M", "806M", "3.2B", "316M"]
    assert of.clip_tokens == 16 * 16 * 16 * 10
    assert float(of.clip_flops(384)) == pytest.approx(3 * (1.3243e12 + 1.1325e11), rel=1e-3)


def test_brain_tokens_need_a_store() -> None:
    of = Family(family("demo").base, brain=True)
    with pytest.raises(UsageError, match=r"none\.zarr is not there"):
        _ = of.clip_tokens


def loss(parameters: float, tokens: float) -> float:
    """By some law."""
    return float(0.2 + 8 * parameters**-0.28 + 600 * tokens**-0.4)


def test_the_nearest_widths_are_told_with_the_one_that_gives_up_least_first() -> None:
    of = family("7M")
    flops = 1e19

    def tokens(parameters: float) -> float:
        return flops / float(of.token_flops(np.array(parameters)))

    widths = range(of.smallest, 1200, of.step)
    best = min(widths, key=lambda width: loss(float(of.parameters(width)), tokens(float(of.parameters(width)))))
    exact = float(of.parameters(float(best) + 0.4 * of.step))
    sizes = near(of, exact, tokens, loss, on_gpus=False)
    assert [size.width for size in sizes] in ([best, best + of.step], [best + of.step, best])
    assert sizes[0].loss == min(size.loss for size in sizes)
    assert all(size.tokens == pytest.approx(flops / (float(of.clip_flops(size.width)) / of.clip_tokens)) for size in sizes)
    suited = near(of, exact, tokens, loss, on_gpus=True)
    assert suited[0].width % 48 == 0
    assert suited[0].loss <= sizes[0].loss * 1.001


def test_a_width_for_gpus_is_left_where_it_costs_too_much() -> None:
    """At 7M the nearest such widths, 48 and 96, are far from it, and a law that punishes that keeps 36."""
    of = family("7M")
    own = float(of.parameters(36))
    sizes = near(of, own, lambda _: 1e9, lambda parameters, _: 1 + abs(np.log(parameters / own)), on_gpus=True)
    assert sizes[0].width == 36
    assert {48} <= {size.width for size in sizes}


def test_an_optimum_below_the_family_takes_its_least_width() -> None:
    of = family("837M_new")
    assert [size.width for size in near(of, 10.0, lambda _: 1e9, loss, on_gpus=False)] == [30]


def test_the_run_of_a_size_is_the_base_but_for_what_a_size_changes(tmp_path: Path) -> None:
    of = family("7M", "train.global_batch=64", "model.parametrisation=mup")
    config, rule, warnings = configure(of, 240, 5000)
    path = tmp_path / "316M.yaml"
    path.write_text(dump(config), encoding="utf-8")
    read = load(PretrainConfig, path)
    assert read == config
    assert (read.model.name, read.model.embed_dim, read.train.max_steps) == ("316M", 240, 5000)
    assert str(read.run.dir) == "runs/pretrain_316M"
    assert (read.optimizer.lr, read.schedule.warmup_steps) == (1e-3, 500)
    assert "muP" in rule
    assert [text for text in warnings if "warmup" in text] == warnings
    assert read.model.parametrisation == "mup"
    same = config.model_copy(update={name: getattr(of.base, name) for name in ("run", "model", "train", "schedule")})
    assert same == of.base


@pytest.mark.parametrize(
    ("words", "width", "rate", "lr", "rule", "warned"),
    [
        ((), 240, 3e-4, 3e-4, "given", False),
        (("optimizer.lr=2e-3",), 36, None, 2e-3, "that of 7M", False),
        ((), 96, None, 1e-4, "configs/pretrain/51M.yaml", False),
        ((), 240, None, 1e-3, "not tuned at this width", True),
        (("model.parametrisation=mup", "optimizer.lr=5e-3"), 96, None, 5e-3, "muP", False),
    ],
)
def test_where_the_learning_rate_comes_from(
    words: tuple[str, ...], width: int, rate: float | None, lr: float, rule: str, warned: bool
) -> None:
    config, said, warnings = configure(family("7M", *words), width, 50000, rate)
    assert config.optimizer.lr == lr
    assert rule in said
    assert any("falls with width" in text for text in warnings) == warned


def test_a_budget_of_a_few_steps_is_refused() -> None:
    with pytest.raises(UsageError, match=r"9 steps of train\.global_batch=256, fewer than 10"):
        configure(family("7M"), 36, 9)
