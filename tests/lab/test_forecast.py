"The time that is left of a run, on runs that are made up: the truth is known to the second."
import random

import pytest

from mcl_repro.lab.forecast import forecast, learned_ratios

KINDS = {"train": 30., "test": 2., "unlearn": 8.}


def stages(count=60, seed=0):
    "Chains of three stages, each with its true seconds."
    draw, found = random.Random(seed), []
    for chain in range(count):
        for place, (kind, seconds) in enumerate(KINDS.items()):
            after = [f"train{chain}"] if place else []
            took = seconds * draw.uniform(.8, 1.25)
            found.append(dict(stage=kind, key=f"{kind}{chain}", inputs=after, took=took, rank=len(found)))
    return found


def truth(found, jobs):
    "When each stage begins and ends, if a free process takes the first that can begin."
    ends, free = {}, [0.] * jobs
    waiting = list(found)
    while waiting:
        now = min(free)
        able = [s for s in waiting if all(ends.get(k, 1e9) <= now for k in s["inputs"])]
        if not able:
            free[free.index(now)] = min(e for e in ends.values() if e > now)
            continue
        s = able[0]
        waiting.remove(s)
        s["began"], ends[s["key"]] = now, now + s["took"]
        free[free.index(now)] = ends[s["key"]]
    return ends


def rows_at(found, ends, now, expected):
    "What `read_status` would say at a moment."
    for s in found:
        known = dict(expected=expected(s), readers=["x.table1"] if s["stage"] == "test" else [], process=None)
        row = {**s, "seconds": None, "eta": None, "share": None, "state": "waiting", **known}
        if ends[s["key"]] <= now:
            row |= dict(state="done", seconds=s["took"], eta=0.)
        elif s["began"] <= now:
            row |= dict(state="running", seconds=now - s["began"])
        yield row | dict(began=None)


@pytest.mark.parametrize("jobs", [1, 2, 5])
@pytest.mark.parametrize("off", [{}, dict(train=.5, test=.5, unlearn=.5), dict(unlearn=3.), dict(train=.7, test=4.)])
def test_within_a_tenth_of_the_run_the_estimate_is_within_thirty_per_cent(jobs, off):
    found = stages()
    ends = truth(found, jobs)
    whole = max(ends.values())
    for part in (.1, .25, .5, .75):
        expected = lambda s: KINDS[s["stage"]] * off.get(s["stage"], 1.)
        left = forecast(list(rows_at(found, ends, part * whole, expected)), jobs).left
        assert left == pytest.approx((1 - part) * whole, rel=.3), part


def test_what_nobody_has_an_estimate_for_is_like_what_is_done(jobs=2):
    found = stages()
    ends = truth(found, jobs)
    whole = max(ends.values())
    rows = list(rows_at(found, ends, .1 * whole, lambda s: None))
    assert forecast(rows, jobs).left == pytest.approx(.9 * whole, rel=.3)
    assert forecast(list(rows_at(found, ends, -1., lambda s: None)), jobs).left is None
    one = list(rows_at(found, ends, -1., lambda s: 30. if s["key"] == "train3" else None))
    assert forecast(one, jobs).left > 0


def test_a_chain_at_the_end_is_not_divided_by_the_processes():
    usual = dict(stage="s", state="waiting", seconds=None, eta=None, share=None, began=None, process=None, expected=10.)
    first = dict(usual, key="a", inputs=[], rank=0, readers=["a"])
    second = dict(usual, key="b", inputs=["a"], rank=1, readers=["b"])
    found = forecast([first, second], 8)
    assert (found.left, found.readers) == (20., dict(a=10., b=20.))
    tied = forecast([first | dict(inputs=["b"]), second], 2)      # no order: what never comes is not waited for
    assert tied.readers == dict(a=None, b=None)


def test_a_single_kind_says_little_of_the_others():
    done = [dict(stage="s", state="done", seconds=50., expected=10., share=None, eta=0.)] * 100
    overall, kinds = learned_ratios(done)
    assert kinds["s"] > 4.8 and overall < 3.1
    more = [dict(d, stage=f"kind{i % 8}") for i, d in enumerate(done)]
    assert learned_ratios(more)[0] > 4.3
    tiny = [dict(d, stage=f"kind{i % 8}", expected=.0005, seconds=.4) for i, d in enumerate(done)]
    assert 1 < learned_ratios(tiny)[0] < 2        # they took 800 times as long, and that is nothing
