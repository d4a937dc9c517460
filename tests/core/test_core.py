"Files and words: what is half written, damaged, missing or misspelt."
import json
import os
import threading

import pytest
from hypothesis import given, settings, strategies as st

from mcl_repro.core.errors import DataError, SettingsError, StoreError
from mcl_repro.core.files import package_version, parse_yaml, read_json, read_text, read_yaml, sha256_of, sha256_of_text
from mcl_repro.core.files import write_atomically, write_json
from mcl_repro.core.words import clock, columns, duration, near, parse_pairs, parse_value, rough_duration


# ---- writing

@pytest.mark.parametrize("error, raised", [(StoreError, StoreError), (None, OSError), (DataError, DataError)])
def test_a_file_stays_as_it_was_where_it_cannot_be_replaced(error, raised, tmp_path, monkeypatch):
    path = write_atomically(tmp_path/"record.json", "before")
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(raised, match="No space left"):
        write_atomically(path, "after", error)
    assert path.read_text() == "before" and os.listdir(tmp_path) == ["record.json"]


def test_an_interrupt_leaves_no_half_file(tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_json(tmp_path/"record.json", {})
    assert os.listdir(tmp_path) == []


def test_others_never_see_half_a_file(tmp_path):
    path, wrong = tmp_path/"record.json", []
    write_json(path, [0]*10_000)
    over = threading.Event()
    def look():
        while not over.is_set():
            found = read_json(path, default=None)
            if not found or len(set(found)) != 1:
                wrong.append(found)
    reader = threading.Thread(target=look)
    reader.start()
    for n in range(100):
        write_json(path, [n]*10_000)
    over.set()
    reader.join()
    assert wrong == [] and os.listdir(tmp_path) == ["record.json"]


def test_a_long_name_and_a_folder_that_is_not_there(tmp_path):
    path = tmp_path/"a"/"b"/("x"*250)
    assert write_atomically(path, b"bytes").read_bytes() == b"bytes"


def test_folders_are_not_made_below_a_file(tmp_path):
    (tmp_path/"file").write_text("x")
    with pytest.raises(StoreError, match="cannot write .*; free space or choose another folder with --runs"):
        write_atomically(tmp_path/"file"/"below.json", "{}")


# ---- reading

@pytest.mark.parametrize("content, says", [
    (b"", "line 1: not JSON"), (b"{", "line 1: not JSON"), (b"[1,\n2", "line 2: not JSON"),
    (b"\n\xff", "line 2: not UTF-8"),
])
def test_a_damaged_file_is_an_error_or_the_default(content, says, tmp_path):
    path = tmp_path/"x.json"
    path.write_bytes(content)
    assert read_json(path, default=None) is None and read_json(path, default={}) == {}
    with pytest.raises(DataError, match=says):
        read_json(path)
    with pytest.raises(StoreError, match=f"{says}.*; make it again"):
        read_json(path, error=StoreError, remedy="make it again")


WORDS = st.text(st.characters(exclude_categories=("Cs",)))
PLAIN = st.none() | st.booleans() | st.integers() | WORDS


@settings(deadline=None, max_examples=50)
@given(st.recursive(PLAIN, lambda inner: st.lists(inner) | st.dictionaries(WORDS, inner)))
def test_json_comes_back_as_it_was(value):
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        assert read_json(write_json(f"{folder}/x.json", value)) == value


def test_missing_files_and_folders_are_one_line(tmp_path):
    for read in (read_text, read_json, read_yaml):
        for path in (tmp_path, tmp_path/"none"):
            with pytest.raises(DataError, match="cannot be read") as problem:
                read(path)
            assert "\n" not in str(problem.value)


def test_checksums_are_those_of_the_bytes(tmp_path):
    path = tmp_path/"x"
    path.write_bytes("é".encode()*100_000)
    assert sha256_of(path) == sha256_of_text("é"*100_000) == sha256_of_text("é".encode()*100_000)


def test_versions_with_and_without_the_build(monkeypatch):
    import importlib.metadata
    monkeypatch.setattr(importlib.metadata, "version", lambda package: "2.13.0+cpu")
    assert package_version("a package of this test") == "2.13.0+cpu"
    assert package_version("a package of this test", build=False) == "2.13.0"
    package_version.cache_clear()


# ---- words

def test_yaml_that_people_write():
    assert parse_yaml("{a: 1e-3, b: 0x10, c: 1_000, d: .inf}") == {"a": .001, "b": 16, "c": 1000, "d": float("inf")}
    for twice in ("{a: 1, a: 1}", "a: 1\nb:\n  c: 1\n  c: 2\n"):
        with pytest.raises(SettingsError, match="stands twice in <unicode string>, line"):
            parse_yaml(twice)


@given(st.text())
@settings(deadline=None)
def test_any_typed_text_is_a_value_or_one_line(text):
    try:
        json.dumps(parse_value(text), default=str)
    except SettingsError as problem:
        assert "\n" not in str(problem)


@given(st.floats(0, 1e9))
def test_durations_are_short(seconds):
    assert 0 < len(duration(seconds)) < 16 and 0 < len(rough_duration(seconds)) < 16 and ":" in clock(seconds)


def test_rows_of_a_terminal_are_cut_and_of_a_pipe_are_whole(monkeypatch):
    row = dict(name="x", text="word "*50)
    assert len(columns([row], ["name", "text"]).splitlines()[1]) > 200
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((40, 20)))
    assert max(map(len, columns([row], ["name", "text"]).splitlines())) == 40
    monkeypatch.setattr(os, "get_terminal_size", lambda: os.terminal_size((0, 0)))        # not known
    assert len(columns([row], ["name", "text"]).splitlines()[1]) > 200


def test_pairs_and_names():
    assert parse_pairs(None, "--set") == {} and parse_pairs([" a = 1 "], "--set") == {"a": 1}
    assert near(3, [1, 2], "row") == "unknown row '3'; known: 1, 2"
