"""What a person wants to know first: has it learned beyond copying, is it healthy, does it resume?"""

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal
from xml.etree.ElementTree import Element

import numpy as np

from swiftv2.errors import SwiftError
from swiftv2.records import NO_FAULT
from swiftv2.report.markup import element, listed
from swiftv2.report.run.overlap import SEEN, checks_of
from swiftv2.report.run.reading import UNREADABLE, Run, why_not
from swiftv2.report.run.words import counted, duration, listing, method

Mark = Literal["good", "look", "bad", "unknown"]
_SIGNS = {"good": "\u2713", "look": "!", "bad": "\u2717", "unknown": "?"}

WAITS = 0.1
"""Share of the time waiting for data from which the verdict speaks of it."""
_TAIL = 0.2
"""Share of the steps that are compared with as many before them, to tell whether the loss still falls."""
_FEWEST = 10
"""Steps of each share below which that is not told."""
_HEALTH, _RESUMES = "Is it healthy?", "Does it resume?"
_CLEAR = 2.0
"""Standard errors by which means of the loss must differ."""


@dataclass(frozen=True)
class Verdict:
    """One answer.

    Attributes:
        question: that it answers.
        mark: how it looks; the word says the same.
        word: the answer, in a word or two.
        says: one sentence.
        notes: what else a person should look at.
    """

    question: str
    mark: Mark
    word: str
    says: str
    notes: tuple[str, ...] = ()


def verdicts(run: Run) -> list[Verdict]:
    """The three answers, top of the page."""
    asked = {_learning(run): learned, _HEALTH: health, _RESUMES: resumes}
    return [_answered(asks, answer, run) for asks, answer in asked.items()]


def _answered(asks: str, answer: Callable[[Run], Verdict], run: Run) -> Verdict:
    try:
        return answer(run)
    except UNREADABLE as error:
        return Verdict(asks, "unknown", "cannot be told", _sentence(why_not("It", error, run.path)))


def shown(answers: list[Verdict]) -> Element:
    """Cards side by side; a sign and a word besides the colour."""
    cards = []
    for one in answers:
        sign = element("span", _SIGNS[one.mark], kind="sign", aria_hidden="true")
        parts = [element("h3", one.question), element("p", sign, " ", element("strong", one.word), kind="answer")]
        parts.append(element("p", one.says))
        parts += [listed(one.notes)] if one.notes else []
        cards.append(element("article", *parts, kind=f"card {one.mark}"))
    return element("div", *cards, kind="cards")


def better_baseline(group: Mapping[str, Any]) -> str | None:
    """The baseline with the highest R2 of a group of an evaluation; None where none has any."""
    means = {name: _mean(one.get("r2")) for name, one in group.get("methods", {}).items() if name != "model"}
    known = {name: mean for name, mean in means.items() if mean is not None}
    return max(known, key=lambda name: known[name]) if known else None


def _mean(estimate: Any) -> float | None:
    mean = estimate.get("mean") if isinstance(estimate, Mapping) else None
    return mean if isinstance(mean, int | float) and math.isfinite(mean) else None


def learned(run: Run) -> Verdict:
    """Whether held-out fluctuation is explained better than by copying, by the intervals of the last evaluation."""
    answer = _finetuned(run) if _is_finetuned(run) else _pretrained(run)
    try:
        checks = checks_of(run)
    except UNREADABLE as error:
        why = f"Leaks cannot be looked for: {_sentence(why_not('data sheet or result', error, run.path))}"
        answer = replace(answer, notes=(*answer.notes, why))
        return replace(answer, mark="unknown", word="cannot be told") if answer.mark == "good" else answer
    unknown = tuple(f"Not known: {check.what}." for check in checks if check.unknown and check.what == SEEN)
    leaks = [f"{check.what}: {check.says}" for check in checks if check.failed]
    notes = (*answer.notes, *unknown)
    if leaks and (run.evaluation is not None or (run.path / "result.json").is_file()):
        says = f"There are leaks ({'; '.join(leaks)}). {answer.says}"
        return replace(answer, mark="bad", word="cannot be believed", says=says, notes=notes)
    return replace(answer, notes=(*(_sentence(f"A leak: {leak}") for leak in leaks), *notes))


def _is_finetuned(run: Run) -> bool:
    return (run.path / "result.json").is_file() or "task" in run.settings


def _learning(run: Run) -> str:
    return "Has it learned the task?" if _is_finetuned(run) else "Has it learned beyond copying?"


def _pretrained(run: Run) -> Verdict:
    asks = _learning(run)
    evaluation = run.evaluation
    if evaluation is None and run.series("heldout/loss")[0]:
        says = "It has been judged on held-out subjects, but evaluation.json is missing or cannot be read."
        return Verdict(asks, "unknown", "cannot be told", says)
    if evaluation is None:
        every = run.setting("train.evaluate_every")
        when = f" The first evaluation comes at step {every}." if every else ""
        return Verdict(asks, "unknown", "cannot be told", f"It has not been judged on held-out subjects yet.{when}")
    try:
        group = evaluation["groups"]["all"]
        return _judged(asks, evaluation, group)
    except (KeyError, TypeError, AttributeError):
        return Verdict(asks, "unknown", "cannot be told", "The last evaluation holds no R2 of model and baselines.")


def _judged(asks: str, evaluation: Mapping[str, Any], group: Mapping[str, Any]) -> Verdict:
    own, best = group["methods"]["model"]["r2"], better_baseline(group)
    if own is None or best is None or _mean(own) is None:
        return Verdict(asks, "unknown", "cannot be told", "No held-out subject fluctuates, so there is no R2 to compare.")
    gain, baseline = group["r2_gain"].get(best), group["methods"][best]["r2"]["mean"]
    step, subjects = evaluation.get("step"), int(group.get("subjects", 0))
    figures = (
        f"On {counted(subjects, 'held-out subject')} at step {step:,} it explains {_share(own)} of the fluctuation; "
        f"the better baseline ({method(best)}) {baseline:.1%}, so it gains {_points(gain)}."
    )
    notes = tuple(_cohorts(evaluation))
    if gain is None or gain["low"] is None or own["low"] is None:
        says = f"{figures} One subject gives no interval: hold out more."
        return Verdict(asks, "unknown", "cannot be told", says, notes)
    if gain["high"] < 0:
        return Verdict(asks, "bad", "no", f"{figures} The baseline does better.", notes)
    if gain["low"] > 0 and own["low"] > 0:
        return Verdict(asks, "good", "yes", figures, notes)
    if gain["low"] > 0 and own["high"] < 0:
        return Verdict(asks, "look", "not yet", f"{figures} It does better than the baseline, but explains nothing.", notes)
    if gain["low"] > 0:
        says = f"{figures} It does better than the baseline, but is not sure to explain any fluctuation: R2 may be 0."
        return Verdict(asks, "look", "not yet", says, notes)
    return Verdict(asks, "look", "not yet", f"{figures} The interval of the gain holds 0.", notes)


def _share(estimate: Mapping[str, Any]) -> str:
    ends = "" if estimate["low"] is None else f" (95 % interval {estimate['low']:.1%} to {estimate['high']:.1%})"
    return f"{estimate['mean']:.1%}{ends}"


def _points(estimate: Mapping[str, Any] | None) -> str:
    if estimate is None:
        return "unknown size"
    ends = "" if estimate["low"] is None else f" ({100 * estimate['low']:.1f} to {100 * estimate['high']:.1f})"
    return f"{100 * estimate['mean']:.1f} points{ends}"


def _cohorts(evaluation: Mapping[str, Any]) -> list[str]:
    """Cohorts in which copying is not beaten; nothing where there is one cohort."""
    groups = {name: group for name, group in evaluation["groups"].items() if name != "all"}
    if len(groups) < 2:
        return []
    ahead = [name for name, group in groups.items() if _beats(group)]
    behind = [name for name in groups if name not in ahead]
    told = f"Beyond copying in {len(ahead)} of {len(groups)} cohorts"
    return [f"{told}; not in {listing(sorted(behind)[:6])}." if behind else f"{told}."]


def _beats(group: Mapping[str, Any]) -> bool:
    best = better_baseline(group)
    gain = group.get("r2_gain", {}).get(best) if best else None
    return gain is not None and gain.get("low") is not None and gain["low"] > 0


def _finetuned(run: Run) -> Verdict:
    asks = _learning(run)
    steps, values = run.series("val/select")
    done = (run.path / "result.json").is_file()
    if not values and not done:
        every = run.setting("train.evaluate_every")
        when = f" The first look comes at step {every}." if every else ""
        return Verdict(asks, "unknown", "cannot be told", f"It has not been judged on validation subjects yet.{when}")
    best = min(range(len(values)), key=values.__getitem__, default=0)
    says = f"On validation subjects step {steps[best]:,} of {steps[-1]:,} is the best so far." if values else ""
    if not done:
        return Verdict(asks, "unknown", "still training", f"{says} Test subjects are predicted once, at the end.")
    try:
        result = run.document("result.json") or {}
        told = [_beyond_chance(name, target) for name, target in result["targets"].items()]
        undefined = [text for text, _ in told if text.endswith(_UNDEFINED)]
        told = [one for one in told if one[0] not in undefined] or told
    except (SwiftError, KeyError, TypeError, AttributeError):
        return Verdict(asks, "unknown", "cannot be told", f"{says} Its result cannot be read.".strip())
    figures = "; ".join(text for text, _ in told)
    notes = tuple(f"{text}." for text in undefined)
    beyond = [sure for _, sure in told]
    if any(sure is None for sure in beyond):
        return Verdict(asks, "unknown", "cannot be told", f"{figures}. Without an interval nothing is shown.", notes)
    if all(beyond):
        return Verdict(asks, "good", "yes", f"{figures}: beyond chance.", notes)
    word = "in part" if any(beyond) else "not shown"
    return Verdict(asks, "look", word, f"{figures}. An interval that holds chance shows nothing.", notes)


_UNDEFINED = " is not defined"


def _beyond_chance(name: str, target: Mapping[str, Any]) -> tuple[str, bool | None]:
    """A target's main metric on test subjects (validation subjects where no test was asked for); whether it beats chance.

    That goes by its interval; None where it has none.
    """
    part = "test" if "test" in target else "val"
    metrics, classes = target[part]["metrics"], target.get("classes") or ()
    chances = {"auroc": 0.5, "balanced_accuracy": 1 / max(2, len(classes)), "r2": 0.0}
    metric = next((key for key in chances if key in metrics), None)
    if metric is None:
        return f"{name}: no metric that has a chance level", None
    found, chance = metrics[metric], chances[metric]
    where = "test" if part == "test" else "validation"
    if found["value"] is None:
        return f"{name}: {metric.replace('_', ' ')} on {where} subjects{_UNDEFINED}", None
    text = f"{name}: {metric.replace('_', ' ')} {found['value']:.3f} on {where} subjects, chance {chance:.3g}"
    if found.get("low") is None:
        return f"{text}, no interval", None
    return f"{text}, 95 % interval {found['low']:.3f} to {found['high']:.3f}", bool(found["low"] > chance)


_BAD = {
    "failed": ("failure", "failures"),
    "hang": ("hang", "hangs"),
    "grace": ("stop that did not come in time", "stops that did not come in time"),
    "lost": ("lost rank", "lost ranks"),
}
_LOOK = {
    "skipped": ("refused step", "refused steps"),
    "rewound": ("rewind", "rewinds"),
    "save_failed": ("failed save", "failed saves"),
    "checkpoint_damaged": ("damaged checkpoint", "damaged checkpoints"),
}


def health(run: Run) -> Verdict:
    """What went wrong, what slows it down, and whether the loss still falls."""
    asks = _HEALTH
    notes: list[str] = [*(_broken(run)), *(f"Damaged: {line}." for line in run.damaged)]
    found = Counter(event["event"] for event in run.events if event.get("error") not in NO_FAULT)
    counts = [counted(found[kind], *words) for kind, words in {**_BAD, **_LOOK}.items() if found[kind]]
    notes += [f"{listing(counts)} so far; the time line below says when and why."] if counts else []
    notes += [*_left_out(run), *_slow(run), *_waiting(run)]
    trend = falling(run)
    state = run.standing.get("state")
    if state in {"failed", "dead"}:
        why = run.standing.get("why") or "nothing was written about its end"
        return Verdict(
            asks, "bad", "no", f"It {'failed' if state == 'failed' else 'died'}: {_sentence(str(why))} {trend}", tuple(notes)
        )
    if _broken(run):
        return Verdict(asks, "bad", "no", f"Its last loss is not a number. {trend}", tuple(notes))
    if not run.metrics:
        return Verdict(asks, "unknown", "cannot be told", "No step has been made yet.", tuple(notes))
    if notes:
        return Verdict(asks, "look", "look at this", trend, tuple(notes))
    return Verdict(asks, "good", "yes", f"No refused step, rewind, failed save or slow rank, no clip left out. {trend}")


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _broken(run: Run) -> list[str]:
    """Losses that were not numbers; the metrics hold null for them."""
    rows = [row for row in run.metrics if "loss" in row]
    bad = [row for row in rows if row["loss"] is None and not row.get("skipped")]
    if not bad:
        return []
    return (
        [f"{counted(len(bad), 'step')} without a finite loss, the last at step {bad[-1]['step']:,}."]
        if bad[-1] is rows[-1]
        else []
    )


def _left_out(run: Run) -> list[str]:
    left = run.last("clips_left_out")
    return [f"{counted(int(left), 'clip')} left out."] if left else []


def _slow(run: Run) -> list[str]:
    told = [event for event in run.told("slow") if event.get("slow")]
    if not told:
        return []
    ranks = Counter(f"rank {one.get('rank')} ({one.get('what')})" for event in told for one in event["slow"])
    names = [name for name, _ in ranks.most_common(3)]
    return [f"Slow ranks in {counted(len(told), 'report')}: {listing(names)}."]


def _waiting(run: Run) -> list[str]:
    share = waiting_share(run)
    return (
        [f"It waits for data {share:.0%} of the time: see the throughput below."] if share is not None and share > WAITS else []
    )


def waiting_share(run: Run) -> float | None:
    """Share of the time of the later half of its steps in which it waited for data; None where that is not known."""
    steps, phase = run.series("seconds/data")
    _, whole = run.series("seconds/step")  # what all parts add up to, an outage of the store among them
    whole = whole or run.series("step_seconds")[1]  # of a run that was made before there was the sum
    if steps and len(whole) == len(phase):
        half = len(steps) // 2
        total = sum(whole[half:])
        return sum(phase[half:]) / total if total else None
    _, shares = run.series("data_wait")
    return float(np.mean(shares[len(shares) // 2 :])) if shares else None


def falling(run: Run) -> str:
    """Whether the training loss of the last steps is lower than that of those before them, beyond its noise."""
    _, losses = run.series("loss")
    size = int(len(losses) * _TAIL)
    if size < _FEWEST:
        return "Too few steps to tell whether the loss falls." if losses else "No loss is known yet."
    former, last = np.asarray(losses[-2 * size : -size]), np.asarray(losses[-size:])
    change = float(last.mean() - former.mean())
    error = math.sqrt(float(former.var(ddof=1) + last.var(ddof=1)) / size)
    share = change / abs(float(former.mean())) if former.mean() else 0.0
    which = f"over the last {_TAIL:.0%} of its steps, against as many before them ({share:+.1%})"
    if abs(change) <= _CLEAR * error:
        return f"The training loss is level {which}."
    return f"The training loss still falls {which}." if change < 0 else f"The training loss rises {which}."


def resumes(run: Run) -> Verdict:
    """What would be lost if it were killed now, and what it has survived."""
    asks = _RESUMES
    attempts = len(run.told("start"))
    survived = len(run.told("resumed"))
    notes = []
    if survived:
        notes.append(f"It has gone on {counted(survived, 'time')} after a stop or a kill ({counted(attempts, 'attempt')}).")
    elif attempts > 1:
        notes.append(f"{counted(attempts, 'attempt')}, none of which went on from a checkpoint.")
    script = (run.path / "resume.sh").is_file()
    if not script:
        notes.append("There is no resume.sh: give the command again by hand.")
    checkpoint = run.standing.get("checkpoint")
    state, last = run.standing.get("state"), run.last("step")
    ends = [event["event"] for event in run.events if event["event"] in {"start", "finished"}]
    if state == "finished" or (state is None and ends[-1:] == ["finished"]):
        there = (
            f", and its last checkpoint, step {checkpoint['step']:,}, is whole" if checkpoint and checkpoint["whole"] else ""
        )
        mark: Mark = "good" if there else "look"
        steps = f"It made all {last:,} steps" if last else "It has finished"
        return Verdict(asks, mark, "it has finished", f"{steps}{there}. Raise train.max_steps to go on.", tuple(notes))
    if checkpoint is None:
        return Verdict(asks, "look", "not yet", "There is no checkpoint: a start would begin at step 0.", tuple(notes))
    lost = max(0, (last or 0) - checkpoint["step"])
    age = duration(float(checkpoint["age_seconds"]))
    if not checkpoint["whole"]:
        says = f"Its newest checkpoint, step {checkpoint['step']:,}, is damaged: {_sentence(str(checkpoint['problem']))}"
        older = _older(run, checkpoint["step"])
        if not older:
            says = f"{says} There is no other: a start would begin at step 0."
            return Verdict(asks, "bad", "no", says, tuple(notes))
        says = f"{says} A start looks at those before it, the next is that of step {older[-1]:,}."
        return Verdict(asks, "bad", "from an older one", says, tuple(notes))
    says = (
        f"Its newest checkpoint is whole: step {checkpoint['step']:,}, {age} old; {counted(lost, 'step')} would be done again."
    )
    how = {"running": " It is running.", "stopped": " It was stopped; resume.sh goes on.", "pending": " It waits in the queue."}
    return Verdict(asks, "good", "yes", says + how.get(str(state), ""), tuple(notes))


def _older(run: Run, step: int) -> list[int]:
    """Steps of finished checkpoints before one."""
    names = (path.parent.name.removeprefix("step_") for path in (run.path / "checkpoints").glob("step_*/manifest.json"))
    return sorted(int(name) for name in names if name.isdecimal() and int(name) < step)
