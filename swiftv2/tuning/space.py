"""From the space of a search to Optuna's draws, and from these to the settings of a trial."""

import math
import random
from collections.abc import Mapping
from typing import Any

import optuna
import yaml

from swiftv2.config.tune import ParameterConfig, PrunerConfig, TuneConfig, plain

_PRIME = 1_000_003


def draw(trial: optuna.trial.Trial, config: TuneConfig) -> dict[str, Any]:
    """The settings of a trial by dotted key; those that were drawn before a keeper was lost come back as they were."""
    values: dict[str, Any] = {}
    for key, parameter in config.space.items():
        if config.applies(key, values):
            values[key] = _suggest(trial, key, parameter)
    return values


def words(values: Mapping[str, Any]) -> list[str]:
    """Settings as `section.key=value` words."""
    return [f"{key}={plain(value)}" for key, value in values.items()]


def make_sampler(config: TuneConfig, number: int) -> optuna.samplers.BaseSampler:
    """What draws the settings of a trial.

    Args:
        config: the search.
        number: of the trial. It is part of the seed: a keeper that takes over goes on, and does not draw the same again.
    """
    seed = (config.seed * _PRIME + number) % 2**32
    chance = optuna.samplers.RandomSampler(seed=seed)
    if config.sampler.kind == "random":
        return chance
    if config.sampler.kind == "grid":
        return optuna.samplers.PartialFixedSampler(_combination(config, number), chance)
    return optuna.samplers.TPESampler(
        n_startup_trials=config.sampler.startup_trials,
        multivariate=True,
        group=True,
        constant_liar=True,
        seed=seed,
    )


def make_pruner(config: PrunerConfig, max_steps: int) -> optuna.pruners.BasePruner:
    """What decides which trials are ended early; `max_steps` is the length of a trial."""
    if config.kind == "none":
        return optuna.pruners.NopPruner()
    if config.kind == "halving":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=config.min_steps, reduction_factor=config.reduction)
    if config.kind == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=config.min_steps, max_resource=max(max_steps, config.min_steps), reduction_factor=config.reduction
        )
    percentile = 50.0 if config.kind == "median" else config.percentile
    return optuna.pruners.PercentilePruner(
        percentile, n_startup_trials=config.startup_trials, n_warmup_steps=config.warmup_steps
    )


def _combination(config: TuneConfig, number: int) -> dict[str, Any]:
    """The combination of a grid that a trial tries: all of them, once each, in an order by chance."""
    values = [parameter.values() or () for parameter in config.space.values()]
    order = list(range(math.prod(map(len, values))))
    random.Random(config.seed).shuffle(order)  # noqa: S311 (no secret)
    place, chosen = order[number % len(order)], {}
    for key, options in zip(config.space, values, strict=True):
        place, index = divmod(place, len(options))
        chosen[key] = _stored(options[index])
    return chosen


def _suggest(trial: optuna.trial.Trial, key: str, parameter: ParameterConfig) -> Any:
    if parameter.choices is not None:
        stored = trial.suggest_categorical(key, [_stored(value) for value in parameter.choices])
        return next(value for value in parameter.choices if _stored(value) == stored and type(_stored(value)) is type(stored))
    assert parameter.low is not None and parameter.high is not None  # noqa: S101, PT018 (held by ParameterConfig)
    if parameter.kind == "int":
        step = int(parameter.step or 1)
        return trial.suggest_int(key, int(parameter.low), int(parameter.high), step=step, log=parameter.log)
    return trial.suggest_float(key, parameter.low, parameter.high, step=parameter.step, log=parameter.log)


def _stored(value: Any) -> Any:
    """A choice as Optuna keeps it: lists and sections as text."""
    return value if value is None or isinstance(value, bool | int | float | str) else plain(value)


def values_of(config: TuneConfig, params: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a trial from what Optuna keeps of it, in the order of the space."""
    found = {}
    for key, parameter in config.space.items():
        if key in params:
            kept = params[key]
            is_text = isinstance(kept, str) and kept not in (parameter.choices or ())
            found[key] = yaml.safe_load(kept) if is_text else kept
    return found
