"CleanCLIP's notebook as a view: any tables or figures can be had, and no cell computes anything."

import pytest
from notebook_views import view

from mcl_repro.papers.cleanclip import CLEANCLIP_OUTPUTS


@pytest.fixture(scope="module")
def view_runs(tmp_path_factory):
    return tmp_path_factory.mktemp("views")     # what several of them need is computed once


def written(runs):
    found = {path.stem for kind in ("tables", "figures") for path in (runs/"smoke"/kind).glob("*.csv")}
    return {name for name in found if not name.endswith("_forest")}


@pytest.mark.parametrize("parameters, expected", [
    (dict(figures=["cleanclip.views"]), {"cleanclip.views"}),
    (dict(figures=["cleanclip.triggers"]), {"cleanclip.triggers"}),
    (dict(figures=["cleanclip.alignment"]), {"cleanclip.alignment"}),
    (dict(tables=["cleanclip.lambda"]), {"cleanclip.lambda"}),
    (dict(tables=["cleanclip.main"], attack_names=["BadNet"]), {"cleanclip.main"}),
    (dict(tables=["cleanclip.poison_count"], figures=["cleanclip.tsne"]), {"cleanclip.poison_count", "cleanclip.tsne"}),
    (dict(figures=["cleanclip.curves"], learning_rates={"CleanCLIP": [1e-4]}), {"cleanclip.curves"}),
    ({}, set(CLEANCLIP_OUTPUTS)),
])
def test_some_tables_and_figures_alone_and_all_of_them(monkeypatch, view_runs, parameters, expected):
    monkeypatch.delenv("IN_TEST", raising=False)
    for kind in ("tables", "figures"):
        for old in (view_runs/"smoke"/kind).glob("*"):
            old.unlink()
    space = view("cleanclip", view_runs, **parameters)
    assert written(view_runs) == expected | {"cleanclip.framework"}     # the drawing is always there
    assert set(space["experiments"].done) == set(space["experiments"].nodes)
