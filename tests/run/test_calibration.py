"The short measurement at the start of a run."
import time

import pytest

from mcl_repro.core.files import read_json
from mcl_repro.lab.costs import StageWork
from mcl_repro.run import calibration
from mcl_repro.run.calibration import calibrate, measure_model, stage_seconds

ONE = dict(type="cpu", threads=1)


def test_importing_libraries_is_not_what_a_model_takes_to_load(monkeypatch):
    "The first model of a process takes longer; here by a whole minute of a clock of our own."
    from mcl_repro.model import clip
    late, first = [0.], [True]
    clock, build = time.perf_counter, clip.build_clip
    def slow(*args, **kwargs):
        late[0] += 60. if first[0] else 0.
        first[0] = False
        return build(*args, **kwargs)
    monkeypatch.setattr(clip, "build_clip", slow)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + late[0])
    assert measure_model("smoke-RN", 16, seconds=.01)["load"] < 30.


def test_pictures_are_drawn_at_the_size_of_the_model(tmp_path):
    rates = calibrate({"smoke-RN": (16, "fp32")}, ONE, tmp_path, 64, seconds=.02)
    assert rates["smoke-RN"]["draw"] < rates[""]["draw"]      # 32 px and 64 px
    drawing = StageWork().add("draw", 100, "smoke-RN")
    assert stage_seconds(drawing, rates) == pytest.approx(100 * rates["smoke-RN"]["draw"])


def test_what_was_measured_before_without_a_kind_is_measured_again(tmp_path, monkeypatch):
    models = {"smoke-RN": (16, "fp32")}
    calibrate(models, ONE, tmp_path, 32, seconds=.01)
    file = tmp_path/"calibration.json"
    known = read_json(file)
    key = next(k for k in known if "smoke-RN" in k)
    del known[key]["draw"]
    calibration.write_json(file, known)
    measured = []
    monkeypatch.setattr(calibration, "measure_model", lambda name, *given: measured.append(name) or {"draw": 1.})
    assert calibrate(models, ONE, tmp_path, 32, seconds=.01)["smoke-RN"]["draw"] == 1. and measured == ["smoke-RN"]
