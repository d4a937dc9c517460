"""The file of drawings: what it holds, that a slip in it is named, and that whatever draws depends on it."""
import pytest

from data_files import refused
from mcl_repro.data.things import INKS, KINDS, kinds_of, PIECES, read_things, sections
from mcl_repro.data.world import fingerprint, render
from mcl_repro.lab import identity

# The fingerprint is made of all tables, the drawings among them. It may change together with the world's VERSION only.
KNOWN = {
    "train": "13644d56316c615a0a29ab6f4ae746f25f7826d7a64e2e70b58409daf7b341f1",
    "train@1": "b0a5eca488be89ba489d89e3f9c2ebd264c058d1f2d9d92d08e35661cf761447",
    "zeroshot_test": "942afea342f18093ad668120d09b6bba46e0d124f6b43186754db4e40d756eef",
    "retrieval_coco": "ebab4e85351d1c9699cc1ca0f2fd187301044d6083410a17787d647ec3c81dfb",
    "mem_coco_train": "4916367749ff0bf28bedde7fd3c4fe46c46c95fbd7dad65e96775f4c0785026a",
    "faces_train": "d577e77d7efd4672d327dd91d73f88331b3e831f70ee0eae9302f649d65ceb1b",
}

@pytest.mark.parametrize("split", KNOWN)
def test_the_definition_is_what_it_was(split):
    assert fingerprint(split) == KNOWN[split]

def test_groups_and_names():
    counts = dict(main=40, things=72, symbols=37, dishes=28, breeds=20, textures=24, people=1)
    assert {group: len(kinds_of(group)) for group in counts} == counts
    assert len({kind.name for kind in KINDS}) == sum(counts.values()) == len(KINDS)
    assert KINDS[0].name == "banana"
    assert KINDS[1].synonyms == ("parasol",)

def test_every_part_has_a_colour_and_every_piece_is_drawn():
    for kind in KINDS:
        for colour, drawing in sections(kind.source):
            assert colour == "*" or colour in INKS, kind.name
            assert not drawing.startswith("@") or drawing[1:] in PIECES, kind.name

GOOD = """[things]
# a comment
ball
  also orb, round thing
  colours red blue
  + oval 50,50,30,30
  ~ poly 1,1
      2,2 3,3
bird
  colours red
  brown: @wing
  *: + blob 1,1 2,2 3,-3.5
     ~ line 2.5 1,1 2,2
[pieces]
wing
  + poly 1,1 2,2 3,3
"""

def read(tmp_path, text):
    (tmp_path/"mine.txt").write_text(text)
    return read_things(tmp_path/"mine.txt")

def test_a_file_becomes_kinds_and_pieces(tmp_path):
    kinds, pieces = read(tmp_path, GOOD)
    assert [kind.name for kind in kinds] == ["ball", "bird"]
    assert kinds[0].source == "+ oval 50,50,30,30; ~ poly 1,1 2,2 3,3"
    assert (kinds[0].synonyms, kinds[0].colours) == (("orb", "round thing"), ("red", "blue"))
    assert kinds[1].source == "brown: @wing // *: + blob 1,1 2,2 3,-3.5; ~ line 2.5 1,1 2,2"
    assert pieces == {"wing": "+ poly 1,1 2,2 3,3"}

@pytest.mark.parametrize("text, message", [
    (GOOD.replace("[pieces]", "  colours red\n[pieces]"), "line 14: colours stands once, before the drawing"),
    (GOOD.replace("also orb, round thing", "also Orb"), "line 4: 'Orb' is no name"),
    (GOOD.replace("red blue", "red blu"), "line 5: 'blu' is no colour that things vary in"),
    (GOOD.replace("+ oval", "+ ovl"), "line 6: '+ ovl 50,50,30,30' is no shape"),
    (GOOD.replace("50,50,30,30", "50,50,30"), "line 6: '50,50,30' is no point of oval; it has 4 numbers"),
    (GOOD.replace("2,2 3,3\nbird", "2,2\nbird"), "line 7: poly has 2 points and needs 3"),
    (GOOD.replace("brown: @wing", "brwn: @wing"), "line 11: 'brwn' is no colour; there are *"),
    (GOOD.replace("@wing", "@wng"), "line 11: there is no piece wng"),
    (GOOD.replace("line 2.5 1,1", "line 1,1"), "line 13: a line needs its width"),
    (GOOD.replace("[pieces]", "[parts]"), "line 14: [parts] is no group"),
    (GOOD + "  red: + oval 1,1,1,1\n", "line 17: 'red: + oval 1,1,1,1' is no shape"),
    ("ball\n  + oval 1,1,1,1\n", "line 1: stands in no group"),
    ("[things]\n  + oval 1,1,1,1\n", "line 2: '+ oval 1,1,1,1' belongs to no thing"),
    ("[things]\nball\n", "line 2: ball has no drawing"),
    ("[pieces]\nwing\n", "line 2: the piece wing has no drawing"),
    ("[things]\nball\n  + oval 1,1,1,1\n", "line 2: ball has a part in its own colour"),
    ("[things]\nball\n  red: + oval 1,1,1,1\nball\n  red: + oval 1,1,1,1\n", "line 4: ball comes twice"),
    ("[things]\nball\n  colours red\n  U+2602 solid\n  + oval 1,1,1,1\n", "line 5: a symbol of the font stands alone"),
    ("[things]\nball\n  colours red\n  U+2602 filled\n", "line 4: 'U+2602 filled' is no shape"),
])
def test_a_slip_is_named_with_its_line(tmp_path, text, message):
    refused(message, read, tmp_path, text)

def test_a_file_that_is_not_there_or_no_text_is_named(tmp_path):
    refused("gone.txt: cannot be read", read_things, tmp_path/"gone.txt")
    (tmp_path/"latin.txt").write_bytes("[things]\ncafé\n".encode("latin1"))
    refused("latin.txt, line 2: not UTF-8", read_things, tmp_path/"latin.txt")

def test_whatever_draws_has_the_drawings_in_its_key(monkeypatch):
    before = identity.code_of(render)[0]
    files = identity._data_files("mcl_repro")
    (name, path), = files["things.txt"]
    changed = path.with_name("world.py")        # any other content will do
    monkeypatch.setitem(files, "things.txt", [(name, changed)])
    monkeypatch.setattr(identity, "_CODE", {})
    assert identity.code_of(render)[0] != before
