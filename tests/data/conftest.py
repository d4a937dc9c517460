"""Every test of data has a data folder of its own."""
import pytest

from data_files import encoded


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    "The data folder: not there before something is written into it."
    monkeypatch.setenv("MCL_REPRO_DATA", str(tmp_path/"home"))
    return tmp_path/"home"

@pytest.fixture
def folder(tmp_path):
    "Ten pictures in a folder whose name has a space."
    path = tmp_path/"my pictures"
    path.mkdir()
    for i in range(10):
        (path/f"{i}.jpg").write_bytes(encoded(i, format="JPEG"))
    return path
