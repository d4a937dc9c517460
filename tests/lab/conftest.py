"Fixtures of the lab's tests."
import pytest
from lab_bench import STEPS, Bench, content


@pytest.fixture
def bench(tmp_path, monkeypatch):
    return Bench(tmp_path, monkeypatch)


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    "The store after a run that nothing happened to."
    with pytest.MonkeyPatch.context() as patch:
        bench = Bench(tmp_path_factory.mktemp("undisturbed"), patch)
        bench.finish()
        others = [step.replace("fit0", "fit1") for step in STEPS]
        assert sorted(bench.starts()) == sorted(["make0", "make1", "fit0", "fit1", "table", *STEPS, *others])
        return content(bench.runs)
