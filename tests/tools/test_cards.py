"""Cards: hostile text comes through unharmed and harms nothing, the same card gives the same bytes,
and the limits' numbers are those of the published tables."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from published_tables import skip_if_older
import yaml
from hypothesis import given, settings, strategies as st
from markdown_it import MarkdownIt

from mcl_repro.tools import cards
from mcl_repro.tools.cards import (
    Card, card_text, collect_limits, input_licence, limits_of, read_card, write_card, write_page,
)
from mcl_repro.data.pairs import ArrayImages, Pairs
from mcl_repro.core.errors import DataError, SettingsError, StoreError
from mcl_repro.core.files import package_yaml

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "nbs" / "results"
HOSTILE = [
    "---",
    "---\nkind: scan\n---",
    "a: b # c",
    "- x",
    "\"quoted\" and 'quoted'",
    "# heading",
    "```\ncode\n```",
    "| a | b |",
    "[here](http://evil.example)",
    "![p](http://evil.example/p.png)",
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>.png",
    '"><svg onload=alert(1)>',
    "&lt;b&gt;",
    "{{ 7*7 }}",
    '{% include "page.css" %}',
    "$x^2$",
    "yes",
    "null",
    "1.",
    "12) x",
    "1e5",
    "1_000",
    "0x10",
    "2026-01-31",
    "12:30:00",
    "=",
    "<<",
    "~",
    "!!python/object:os.system x",
    "*alias",
    "&anchor",
    "🍌 emoji",
    "line\u2028separator",
    "next\x85line",
    "nul\x00byte",
    "bell\x07",
    "\ufeffbom",
    "gpj\u202e.exe",
    "lone\ud800surrogate",
    "tab\tand\r\nreturn",
    " leading and trailing ",
    "",
    "long " * 3000,
    "https://example.org/a/b?c=d",
    "www.example.org",
    "@someone",
]


def card_with(text):
    "A card that says `text` wherever somebody's words may stand."
    return Card(
        "repaired model",
        text,
        text,
        "neutral",
        (text, "plain"),
        {"text": text, "nested": {"list": [text, 1, None, True]}, text or "empty": 1},
        ({"what": text, "value": 1.5, "unit": text, "note": text},),
        ({"what": text, "name": text, "licence": text, "fingerprint": text},),
        ({"text": text, "evidence": text},),
        (text,),
    )


class Page(HTMLParser):
    "What a browser would make of a page: its elements, and its text."

    def __init__(self, html):
        super().__init__()
        self.elements, self.text = [], []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text.append(data)


def elements(path):
    return Page(Path(path).read_text(encoding="utf-8")).elements


# ---- there and back


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t[:20]))
def test_hostile_text_comes_back_as_it_was(text, tmp_path):
    card = card_with(text)
    path = write_card(card, tmp_path / "README.md")
    assert read_card(path) == card and read_card(write_card(read_card(path), tmp_path / "again.md")) == card
    assert path.read_bytes() == (tmp_path / "again.md").read_bytes()


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(codec=None, exclude_categories=()), max_size=60))
def test_any_text_comes_back_as_it_was(text):
    card = card_with(text)
    front = yaml.load(re.match(r"---\n(.*?)^---$", card_text(card), re.S | re.M)[1], cards._SafeFacts)
    values = {f.name: front[f.name] for f in dataclasses.fields(Card)}
    assert Card(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}) == card
    card_text(card).encode("utf-8")


@settings(max_examples=100, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
        max_leaves=12,
    )
)
def test_any_settings_come_back_as_they_were(value):
    card = Card("scan", "a", "b", settings=dict(value=value))
    facts = yaml.load(card_text(card).split("\n---\n")[0].removeprefix("---\n"), cards._SafeFacts)
    assert facts["settings"] == card.settings and json.loads(json.dumps(card.settings)) == card.settings


def test_the_same_card_gives_the_same_bytes_in_another_process(tmp_path):
    code = """
import sys
from mcl_repro.tools.cards import read_card, write_card, write_page
card = read_card(sys.argv[1])
write_card(card, sys.argv[2])
write_page(card, sys.argv[2] + ".html")
"""
    card = dataclasses.replace(card_with("a *b* <c>"), limits=limits_of("scan", "protect"))
    first = write_card(card, tmp_path / "first.md")
    page = write_page(card, tmp_path / "first.html")
    subprocess.run(
        [sys.executable, "-c", code, first, tmp_path / "second.md"],
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)},
        timeout=100,
    )
    assert (tmp_path / "second.md").read_bytes() == first.read_bytes()
    assert (tmp_path / "second.md.html").read_bytes() == page.read_bytes()


def test_facts_that_yaml_could_not_keep_are_made_plain_or_refused():
    card = Card(
        "scan",
        "a",
        "b",
        settings=dict(
            a=np.int64(3), b=np.array([[1.0, 2.0]]), c=(1, (2,)), d=float("inf"), e={1: "x"}, f=np.bool_(True)
        ),
        measured=[dict(what="x", value=np.float32(0.5))],
    )
    assert card.settings == dict(a=3, b=[[1.0, 2.0]], c=[1, [2]], d=None, e={"1": "x"}, f=True)
    assert card.measured == (dict(what="x", value=0.5),)
    for bad in (
        dict(settings=dict(x={1, 2})),
        dict(settings=dict(x=b"bytes")),
        dict(measured=(1,)),
        dict(done=(1,)),
        dict(limits=dict(text="a")),
        dict(tone="Good"),
    ):
        with pytest.raises(SettingsError) as e:
            Card("scan", "a", "b", **bad)
        assert "\n" not in str(e.value)


def test_no_path_of_this_machine_stays_in_a_card():
    paths = "/data/somebody/secret/pics/a.jpg cannot be read, nor D:\\somebody\\pics\\b.png or ~/secret/c.png"
    said = f"{paths}; see https://example.org/x/y"
    card = Card(
        "scan",
        said,
        said,
        done=(said,),
        settings=dict(where="/data/some body/secret/x.csv", note=said),
        inputs=(dict(what="pairs", name="/data/somebody/secret/x.csv"),),
        notes=(said,),
    )
    text = card_text(card)
    assert "secret" not in text
    assert "somebody" not in text
    assert "some body" not in text
    assert "https://example.org/x/y" in card.title
    assert card.settings["where"] == "…/x.csv"
    assert card.inputs[0]["name"] == "…/x.csv"
    assert dataclasses.replace(card) == card


# ---- files that are no cards


def test_the_loader_of_cards_is_a_safe_one():
    assert issubclass(cards._SafeFacts, yaml.SafeLoader)
    assert not vars(cards._SafeFacts).keys() & {"yaml_constructors", "yaml_multi_constructors"}


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "must begin with ---"),
        (b"# A model\n", "must begin with ---"),
        (b"---\ntitle: x\n", "must begin with ---"),
        (b"\xff\xfe---", "not UTF-8"),
        (b"---\n---\n", "needs kind, title and outcome"),
        (b"---\n- a\n- b\n---\n", "needs kind, title and outcome"),
        (b"---\nkind: scan\ntitle: a\noutcome: [\n---\n", "not safe YAML"),
        (b"---\nkind: scan\ntitle: a\noutcome: !!python/object/apply:os.getcwd []\n---\n", "not safe YAML"),
        (b"---\nkind: scan\ntitle: a\noutcome: b\ntone: great\n---\n", "a tone is"),
        (b"---\nkind: scan\ntitle: a\noutcome: b\nnotes: one\n---\n", "tuple of sentences"),
        (b"---\nkind: scan\ntitle: a\noutcome: b\nmeasured: [1]\n---\n", "tuple of dictionaries"),
        (b"---\nkind: scan\ntitle: a\noutcome: b\nsettings: {d: 2026-01-31}\n---\n", "of type date"),
        (b"---\nkind: scan\ntitle: &a b\noutcome: *a\n---\n", "aliases are not allowed"),
        (b"---\nkind: scan\ntitle: a\noutcome: " + b"[" * 5000 + b"\n---\n", "not safe YAML"),
    ],
)
def test_a_file_that_is_no_card_is_refused_in_one_line(content, said, tmp_path):
    (tmp_path / "x.md").write_bytes(content)
    with pytest.raises(DataError, match=re.escape(said)) as e:
        read_card(tmp_path / "x.md")
    assert "\n" not in str(e.value)


def test_a_folder_or_a_missing_file_is_refused(tmp_path):
    for path in (tmp_path, tmp_path / "none.md"):
        with pytest.raises(DataError, match="cannot be read as a card"):
            read_card(path)


def test_a_card_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    card, path = card_with("x"), tmp_path / "README.md"
    before = write_card(card, path).read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(StoreError, match="No space left"):
        write_card(dataclasses.replace(card, title="y"), path)
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["README.md"]


def test_a_card_that_other_tools_wrote_around_is_still_read(tmp_path):
    "Windows line ends, more keys, and a body that has been edited."
    card = Card("scan", "a", "b", notes=("one",))
    text = card_text(card, date="2026-01-31").replace(
        "---\n\n", "pipeline_tag: zero-shot-image-classification\n---\n\nEdited.\n", 1
    )
    (tmp_path / "x.md").write_bytes(text.replace("\n", "\r\n").encode())
    assert read_card(tmp_path / "x.md") == card


def test_what_the_hub_is_told_is_what_is_known():
    facts = lambda *licences, kind="repaired model": yaml.safe_load(
        card_text(Card(kind, "a", "b", inputs=tuple(dict(what="x", name="y", licence=w) for w in licences)))
        .split("\n---\n")[0]
        .removeprefix("---\n")
    )
    assert facts("MIT", "MIT")["license"] == "mit"
    assert facts("Apache-2.0 (generated by mcl_repro)")["license"] == "apache-2.0"
    assert all(
        "license" not in facts(*w)
        for w in ((), ("MIT", "not stated"), ("MIT", "Apache-2.0"), ("research purposes only",), (None,))
    )
    assert facts()["library_name"] == "open_clip"
    assert "library_name" not in facts(kind="protected pairs")
    assert facts(kind="protected pairs")["tags"] == ["mcl_repro", "protected-pairs"]
    silent = dataclasses.replace(Card("repaired model", "a", "b"), settings=dict(library_name=None))
    assert "library_name: open_clip" not in card_text(silent)
    assert {"mcl_repro", "torch", "open_clip_torch"} >= set(facts()["made_with"]) >= {"torch"} and "date" not in facts()


def test_the_hubs_own_reader_reads_a_card(tmp_path):
    from huggingface_hub import DatasetCard, ModelCard

    given = dict(what="model", name="RN50", licence="MIT")
    model = ModelCard.load(
        write_card(Card("repaired model", "a model", "It works.", inputs=(given,)), tmp_path / "model.md")
    )
    assert (model.data.license, model.data.library_name, model.data.tags) == (
        "mit",
        "open_clip",
        ["mcl_repro", "repaired-model"],
    )
    assert model.data.title == "a model" and model.text.strip().startswith("# a model\n\n**It works.**")
    pairs = DatasetCard.load(write_card(Card("protected pairs", "my pairs", "They are safe."), tmp_path / "pairs.md"))
    assert pairs.data.tags == ["mcl_repro", "protected-pairs"] and "library_name" not in pairs.data


@pytest.mark.parametrize(
    "kind, of",
    [
        ("scan", "dataset"),
        ("attack", "dataset"),
        ("protected pairs", "dataset"),
        ("measurement", "model"),
        ("repaired model", "model"),
        ("trained model", "model"),
    ],
)
def test_a_card_is_of_a_model_or_of_data(kind, of):
    assert cards.hub_card(Card(kind, "a", "b")).repo_type == of


# ---- nothing turns into markup


def rendered(card):
    "The body as a Markdown reader sees it: the kinds of its blocks and spans, and the text of each block."
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(card_text(card).partition("\n---\n")[2])
    spans = lambda t: [c.type for c in t.children if c.type != "text"] if t.children is not None else []
    return [(t.type, t.tag, [s for s in spans(t) if s != "text_special"]) for t in tokens], [
        "".join(c.content for c in t.children) for t in tokens if t.type == "inline"
    ]


@pytest.mark.parametrize("text", [t for t in HOSTILE if t.strip()], ids=lambda t: ascii(t[:20]))
def test_hostile_text_stays_text_in_markdown(text):
    (blocks, said), (plain, _), seen = rendered(card_with(text)), rendered(card_with("a")), cards._shown(text)
    assert blocks == plain and said[:3] == [seen, seen, "What was done"] and said[-1] == seen
    assert not re.search(
        r"://|www\.|[\x00-\x08\x7f-\x9f\u202e\u2028\ufeff]", card_text(card_with(text)).partition("\n---\n")[2]
    )


@pytest.mark.parametrize("text", HOSTILE, ids=lambda t: ascii(t[:20]))
def test_hostile_text_stays_text_on_the_page(text, tmp_path):
    image = np.zeros((8, 8, 3), np.uint8)
    extras = lambda t: dict(
        galleries=[(t, [dict(image=image, caption=t, label=t, tone="bad")], t)],
        tables=[(t, pd.DataFrame([[t]], columns=pd.Index([t or "x"], dtype=object), dtype=object), t)],
    )
    page, plain = (
        elements(write_page(card_with(t), tmp_path / f"{i}.html", **extras(t))) for i, t in enumerate((text, "a"))
    )
    allowed = {
        "html",
        "head",
        "meta",
        "title",
        "link",
        "style",
        "body",
        "div",
        "header",
        "main",
        "footer",
        "section",
        "p",
        "h1",
        "h2",
        "ul",
        "ol",
        "li",
        "dl",
        "dt",
        "dd",
        "figure",
        "figcaption",
        "img",
        "span",
        "table",
        "caption",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    }
    assert {t for t, _ in page} <= allowed
    loading = lambda elements: [tag for tag, _ in elements if tag in ("img", "meta", "link", "style")]
    assert loading(page) == loading(plain)
    assert all(
        not name.startswith("on")
        and name
        in {
            "lang",
            "charset",
            "name",
            "content",
            "http-equiv",
            "rel",
            "href",
            "class",
            "src",
            "alt",
            "role",
            "tabindex",
            "aria-label",
            "scope",
        }
        for _, a in page
        for name in a
    )
    assert all(a.get("src", "data:").startswith("data:image/") or "src" not in a for _, a in page)
    assert all(a.get("href", "data:,") == "data:," for _, a in page)


# ---- the page


def full_page(path, images=(np.zeros((16, 16, 3), np.uint8),)):
    import matplotlib

    matplotlib.use("agg")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([1, 2])
    items = [
        dict(image=i, caption=f"a picture {k}", label="score 0.9", tone=("bad", "good", "neutral")[k % 3])
        for k, i in enumerate(images)
    ]
    card = dataclasses.replace(card_with("words"), tone="bad", limits=limits_of("scan"))
    return write_page(
        card,
        path,
        galleries=[("Worst", items, "text")],
        figures=[("Scores", figure, "They rise.")],
        tables=[("Pairs", pd.DataFrame(dict(a=[1.5, 2], b=["x", None])), "text")],
    )


def test_a_page_loads_nothing_and_can_be_read_aloud(tmp_path):
    path = full_page(tmp_path / "p.html")
    found, text = elements(path), path.read_text()
    assert not re.findall(r"(?:https?:)?//(?!\w*;)", re.sub(r"base64,[\w+/=]+", "", text))
    assert "@import" not in text
    assert "url(" not in text
    assert any(
        a.get("http-equiv") == "Content-Security-Policy" and a["content"].startswith("default-src 'none'")
        for t, a in found
        if t == "meta"
    )
    assert ("html", {"lang": "en"}) in found
    assert all(a.get("alt") for t, a in found if t == "img") and sum(t == "img" for t, _ in found) == 2
    tags = [t for t, _ in found]
    assert tags.count("h1") == 1
    assert tags.index("h1") < tags.index("h2")
    assert tags.count("table") == tags.count("caption") == 3
    assert all(a.get("scope") for t, a in found if t == "th")
    assert '<span class="tone bad">Problem</span>' in text and text.index("Problem") < text.index(
        "<h2>"
    )  # the outcome is first, and in words


def test_a_gallery_of_noise_stays_small(tmp_path):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (400, 300, 3), dtype=np.uint8)                      # nothing compresses worse
    assert full_page(tmp_path / "p.html", [noise] * 48).stat().st_size < 1_100_000
    smooth = np.repeat(np.repeat(rng.integers(0, 256, (10, 10, 3), dtype=np.uint8), 30, 0), 30, 1)
    assert full_page(tmp_path / "q.html", [smooth] * 48).stat().st_size < 400_000


@pytest.mark.parametrize(
    "image",
    [np.zeros((8, 8)), np.zeros((8, 8, 4), np.uint8), np.zeros((0, 8, 3), np.uint8), np.zeros((8, 8, 3)), None],
    ids=["grey", "alpha", "empty", "float", "none"],
)
def test_a_picture_that_cannot_be_shown_is_refused_before_anything_is_written(image, tmp_path):
    with pytest.raises(SettingsError, match="a picture of a gallery is uint8"):
        write_page(card_with("a"), tmp_path / "p.html", galleries=[("G", [dict(image=image, caption="c")], "")])
    assert not list(tmp_path.iterdir())


def test_pictures_of_odd_shapes_and_empty_parts(tmp_path):
    images = [np.zeros(s + (3,), np.uint8) for s in ((1, 1), (1, 3000), (3000, 1), (161, 160))]
    page = full_page(tmp_path / "p.html", images).read_text()
    assert page.count("<img") == 5
    bare = write_page(
        Card("scan", "a", "b"),
        tmp_path / "q.html",
        galleries=[("None", [], "")],
        tables=[("Empty", pd.DataFrame(dict(a=[])), "")],
    ).read_text()
    assert "No picture." in bare and "Measured" not in bare and "Limits" not in bare
    with pytest.raises(SettingsError, match="a tone is"):
        write_page(
            card_with("a"), tmp_path / "r.html", galleries=[("G", [dict(image=images[0], caption="c", tone="red")], "")]
        )


def test_tables_of_any_data_frame():
    frame = pd.DataFrame(
        {
            "n": pd.array([1, None], dtype="Int64"),
            "when": pd.to_datetime(["2026-01-31", None]),
            "kind": pd.Categorical(["a", None]),
            "v": np.float32([0.5, np.nan]),
            "l": [[1], None],
        },
        index=pd.Index(["r1", "r2"], name="row"),
    )
    grid = cards._frame_grid(frame)
    assert [h for h, _ in grid["heads"]] == ["row", "n", "when", "kind", "v", "l"]
    assert [t for t, _ in grid["rows"][0]] == ["r1", "1", "2026-01-31 00:00:00", "a", "0.5", "[1]"]
    assert [t for t, _ in grid["rows"][1]] == ["r2", "", "", "", "", ""]
    odd = cards._frame_grid(
        pd.DataFrame({"a": [np.array([1, 2]), float("inf"), -0.5]}, index=pd.Index([1, 2, 3], name="a"))
    )
    assert odd["heads"] == [("a", "number"), ("a", "number")]
    assert [r[1][0] for r in odd["rows"]] == ["[1 2]", "inf", "−0.5"]


# ---- licences


def test_licences_are_those_of_the_manifest_or_not_stated():
    manifest = (
        yaml.safe_load((ROOT / "data_manifest.yaml").read_text())["datasets"]
        if (ROOT / "data_manifest.yaml").exists()
        else {}
    )
    for name, entry in manifest.items():
        if name != "world":
            assert input_licence(f"{name}:train:10") == (
                "not stated" if entry["licence"] == "unknown" else entry["licence"]
            )
    mine = Pairs(["1"], ["a cat"], ArrayImages(np.zeros((1, 8, 8, 3), np.uint8)), name="coco")
    assert input_licence(mine) == "not stated"                                       # a name is not a licence
    assert input_licence(Path("data/coco/train.csv")) == "not stated"


# ---- limits


def shipped():
    "The numbers of the limits that come with the package."
    return yaml.safe_load((resources.files("mcl_repro.tools")/"limits_values.yaml").read_text(encoding="utf-8"))


def sentences_with_holes():
    "topic -> its entries in limits.yaml."
    return yaml.safe_load((resources.files("mcl_repro.tools")/"limits.yaml").read_text(encoding="utf-8"))


@pytest.mark.skipif(
    not (RESULTS / "run.json").exists(),
    reason="nbs/results is not here: an installed package has no published tables to compare with",
)
def test_shipped_numbers_are_those_of_the_published_tables():
    "Mend with: python -c \"from mcl_repro.tools.cards import write_limits; write_limits('nbs/results')\"."
    skip_if_older()
    assert collect_limits(RESULTS) == shipped()


@pytest.mark.skipif(not (RESULTS / "run.json").exists(), reason="nbs/results is not here")
def test_a_changed_table_or_a_lost_cell_is_noticed(tmp_path):
    skip_if_older()
    copy = tmp_path / "results"
    shutil.copytree(RESULTS, copy)
    table = copy / "tables" / "cfbd.precision.csv"
    text, row = table.read_text(encoding="utf-8"), r"(BadCLIP,fine,TPR),[^,]+,"
    assert len(re.findall(row, text)) == 1
    table.write_text(re.sub(row, r"\1,43,", text), encoding="utf-8")
    of = lambda limits: limits["values"]["scan:cfbd.natural"]["natural"]["value"]
    assert of(collect_limits(copy)) == 43.0 != of(shipped())
    table.write_text(re.sub(row, r"\1,100,", text), encoding="utf-8")
    with pytest.raises(
        SettingsError, match="scan:cfbd.natural says that natural < templates, and the tables say 100 and 100; write an"
    ):
        collect_limits(copy)
    table.write_text(re.sub(r"\w+,fine,TPR.*\n", "", text), encoding="utf-8")
    with pytest.raises(SettingsError, match="cfbd.precision: unknown metric 'TPR'"):
        collect_limits(copy)
    table.write_text(re.sub(row + r"[^,]+,[^,]+,1", r"\1,,,,", text), encoding="utf-8")
    with pytest.raises(SettingsError, match="cfbd.precision: 0 cells"):
        collect_limits(copy)
    run = json.loads((copy / "run.json").read_text())
    del run["records"]["tables/cfbd.precision.csv"]
    (copy / "run.json").write_text(json.dumps(run))
    with pytest.raises(SettingsError, match="table cfbd.precision is not among the published ones"):
        collect_limits(copy)


def test_every_sentence_is_filled_and_says_where_it_is_from():
    entries, known = sentences_with_holes(), shipped()
    for topic, sentences in entries.items():
        assert len({e["id"] for e in sentences}) == len(sentences)
        assert all(set(e) <= {"id", "text", "values", "holds", "figure"} for e in sentences)
        told = limits_of(topic if topic != "every" else "measure")
        for e in sentences:
            assert ("values" in e) + ("figure" in e) < 2
            assert "values" not in e or {k for k, _ in re.findall(r"\{(\w+)(:\w+)?\}", e["text"])} <= set(e["values"])
            if "values" not in e:
                without_references = re.sub(r"arXiv \d+\.\d+|CVPR \d+", "", e["text"])
                assert not re.search(r"\d", without_references), e["id"]          # no number without a table
            if not {"values", "figure"} & set(e):
                assert "not measured" in e["text"] or "does not measure" in e["text"], e["id"]
        for row in told:
            assert set(row) == {"text", "evidence"} and "{" not in row["text"], row
            ran = f"run {known['run']}, profile {known['profile']}"
            assert row["evidence"] == "not measured here" or row["evidence"].startswith(ran), row


def test_numbers_in_sentences_are_only_those_of_tables():
    "A digit in a sentence is part of a hole, or of a reference."
    allowed = re.compile(r"\{[^}]*\}|arXiv \d+\.\d+|CVPR \d+|95% interval")
    for topic, sentences in sentences_with_holes().items():
        for e in sentences:
            assert not re.search(r"\d", allowed.sub("", e["text"])), (topic, e["id"])


def test_limits_of_topics():
    everything = [
        limits_of(t)
        for t in (
            "scan",
            "repair",
            "repair:ubt",
            "repair:cleanclip",
            "repair:supervised",
            "protect",
            "attack",
            "measure",
        )
    ]
    assert all(len(found) >= 1 for found in everything)
    assert all(len({r["text"] for r in found}) == len(found) for found in everything)
    assert limits_of("repair:UBT") == limits_of("repair:ubt")
    assert limits_of("repair:linear probe") == limits_of("repair:linear_probe")
    assert limits_of() == ()
    assert set(map(repr, limits_of("scan"))) < set(map(repr, limits_of("scan:cfbd")))
    assert all("CFBD" in r["text"] for r in limits_of("scan:cfbd") if "cfbd." in r["evidence"])
    assert not any(
        "cfbd" in r["evidence"].lower() for t in ("scan", "scan:contrast") for r in limits_of(t)
    )  # nothing that was measured with the one method is said of the other
    assert limits_of("protect:mem") == limits_of("protect") and limits_of("attack:badnet") == limits_of("attack")
    assert [r["evidence"] for r in limits_of("repair:mine")][:1] == ["not measured here"]
    assert "mine" in limits_of("repair:mine")[0]["text"]
    for unknown in ("every", "nothing", ""):
        with pytest.raises(SettingsError, match="unknown topic of limits"):
            limits_of(unknown)


def test_numbers_that_were_not_collected_are_not_made_up(monkeypatch):
    real = package_yaml
    monkeypatch.setattr(
        cards, "package_yaml", lambda name: real(name) if name == "tools/limits.yaml" else {**real(name), "values": {}}
    )
    with pytest.raises(SettingsError, match="call write_limits with the published results"):
        limits_of("scan:cfbd")
