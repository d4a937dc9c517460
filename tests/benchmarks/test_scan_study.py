"""The study of scans, two tiny points. The model of profile smoke knows next to nothing: its numbers say nothing."""
import csv

import numpy as np

import scan_study
from mcl_repro.lab.lab import Lab
from mcl_repro.tools.scanning import study


def test_one_attack_and_the_clean_set(tmp_path):
    lab = Lab("smoke", "cpu", tmp_path)
    tiny = scan_study.scan_study(lab, attacks=["BadNets"], axes={}, clean=(), methods=("contrast",))
    assert tiny.experiment.tolist() == ["attack", "clean"]
    assert tiny.poisoned.tolist() == [12, 0] and set(tiny.pairs) == {400}
    assert tiny.AUROC.iloc[0] >= 0 and np.isnan(tiny.AUROC.iloc[1]) and tiny.attacked.dtype == bool


def test_the_command_writes_the_columns_of_the_table_that_the_tool_quotes(tmp_path, monkeypatch, capsys):
    row = dict(zip(study().columns, ["attack", "BadNets", "contrast", *[0] * 8]))
    def small(lab, say):
        say(row)
        return scan_study.pd.DataFrame([row])
    monkeypatch.setattr(scan_study, "scan_study", small)
    out = tmp_path/"scan_study.csv"
    assert scan_study.main(["--profile", "smoke", "--runs", str(tmp_path/"runs"), "--out", str(out)]) == 0
    with open(out, newline="", encoding="utf-8") as f:
        assert next(csv.reader(f)) == list(study().columns)
    assert "BadNets" in capsys.readouterr().err
    assert scan_study.main(["--profile", "no_such", "--runs", str(tmp_path/"runs")]) == 2
    assert capsys.readouterr().err.startswith("error: ")
