"The site: a small one of a toy library is built once, read page by page, and opened in a browser where there is one."
import functools
import html
import http.server
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell as code
from nbformat.v4 import new_markdown_cell as text
from nbformat.v4 import new_notebook
from nbformat.v4 import new_output as output

import mcl_repro
from mcl_repro.core.errors import SettingsError
from mcl_repro.dev import site as made
from mcl_repro.dev import site_pages
from mcl_repro.report.rules import read_claims

ROOT = Path(mcl_repro.__file__).parent.parent
PACKAGES = {"sphinx": "sphinx", "furo": "furo", "myst_nb": "myst-nb", "sphinx_codeautolink": "sphinx-codeautolink"}
needs_sphinx = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in PACKAGES),
                                  reason="needs the extra: pip install 'mcl_repro[site]'")
PNG = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
MACHINE = "/".join(["", "home", "somebody", "runs"])

MODULE = '''"""Things that a toy library has."""
__all__ = ["LIMIT", "Thing", "count"]

# %% ../../nbs/papers/toy.ipynb #00000006
LIMIT = 3   # the most that may be counted

# %% ../../nbs/papers/toy.ipynb #00000007
from dataclasses import dataclass


@dataclass
class Thing:
    "A thing; see `count`."
    size: int = 1   # in metres, *always*

    def twice(
        self,
        by: int = 2,  # how often
    ) -> int:         # the product
        "The size, several times."
        return self.size*by


def count(
    things: list[Thing],  # `Thing`s
    limit: int = LIMIT,   # where to stop
) -> int:                 # how many there are
    "Count things."
    return min(len(things), limit)


def _secret():
    "Not for readers."
'''


def write(path, cells, **metadata):
    "Write a notebook whose cells have the ids 00000000, 00000001 ..."
    for number, cell in enumerate(cells):
        cell["id"] = f"{number:08x}"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)


def toy_cells():
    "A paper's notebook as a run leaves it."
    picture = output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})
    table = output("execute_result", {"text/html": "<table><tr>" + "<td>wide column</td>"*40 + "</tr></table>"})
    prose = ("Needs $\\theta_p$, `count`, `toy_library.papers.toy.Thing`, `Thing.twice`, `no_such_name` and "
             "[the home page](../index.ipynb); see `tutorials/first`.\n\n$$\\frac{a}{b} = \\sum_i x_i$$")
    uses = "from toy_library.papers.toy import count\nimport os\ncount([]); os.getcwd()"
    return [text("# Toy paper\n\n> A toy."), text(prose),
            code("profile = 'mini'", metadata={"tags": ["parameters"]}),
            code(f"# Parameters\nprofile = 'smoke'\nruns = '{MACHINE}'", metadata={"tags": ["injected-parameters"]}),
            code("#| default_exp papers.toy"),
            code("#| hide\nhidden_name = 1", outputs=[output("stream", text="hidden words")]),
            code("#| export\nLIMIT = 3   # the most that may be counted"),
            code("#| export\nclass Thing: pass\n\ndef count(things): pass"),
            text("## Pictures"),
            code(uses, outputs=[output("stream", text=f"\x1b[31mred\x1b[0m <tag> {MACHINE}/x\n"),
                                output("stream", name="stderr", text="a warning")]),
            code("save_figure(fig, 'toy.figure')", outputs=[picture]),
            code("drawing = fig", outputs=[picture], metadata={"tags": ["hide-input"]}),
            code("frame", outputs=[table]), code("1 + 1", outputs=[output("execute_result", {"text/plain": "2"})])]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    "A library, its notebooks, and a run of one of them."
    top = tmp_path_factory.mktemp("sources")
    for folder in ("toy_library", "toy_library/papers"):
        (top/folder).mkdir()
        (top/folder/"__init__.py").write_text('"""A toy."""\n')
    (top/"toy_library/papers/toy.py").write_text(MODULE)
    committed = [c for c in toy_cells() if "injected-parameters" not in c.metadata.get("tags", [])]
    write(top/"nbs/papers/toy.ipynb", committed)
    write(top/"nbs/tutorials/first.ipynb", [text("# First steps"), code("1"), text("## Then\n\nStop.")])
    write(top/"nbs/aside.ipynb", [text("# Aside"), code("answer = 42")])
    write(top/"nbs/.ipynb_checkpoints/aside-checkpoint.ipynb", [text("# Old")])
    home = "Read [first](nbs/tutorials/first.ipynb), then [toy](nbs/papers/toy.ipynb)."
    write(top/"nbs/index.ipynb", [text("# Home\n\n> Of a toy."), text(home)])
    run = top/"runs/smoke"
    record = {"exception": None, "end_time": "2026-01-01", "parameters": {"runs": MACHINE}}
    write(run/"notebooks/toy.ipynb", toy_cells(), papermill=record)
    for folder in ("figures", "claims", "tables"):
        (run/folder).mkdir()
    (run/"figures/toy.figure.json").write_text(json.dumps({"alt": 'A toy "in" words'}))
    (run/"claims.csv").write_text("id,paper,audit,verdict,margin,evidence\nubt.c01,ubt,holds,replicated,+1.2,Table 1\n"
                                  "mem.c01,mem,fails,not_replicated,,<b>\n")
    head = '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
    links = '<a href="../tables/ubt.table1.csv">t</a><a href="../index.html#ubt">r</a></html>'
    (run/"claims/ubt.c01.html").write_text(f"<!doctype html><html><head>{head}</head>{links}")
    (run/"tables/ubt.table1.csv").write_text("1\n")
    return top


@contextmanager
def toy(sources):
    "Make the site of the toy library."
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(sources)
        patch.setattr(site_pages, "PACKAGE", "toy_library")
        yield


@pytest.fixture
def toy_library(sources):
    with toy(sources):
        yield


@pytest.fixture(scope="module")
def built(sources):
    with toy(sources):
        home = made.build_site(sources/"runs", "smoke", notebooks=sources/"nbs")
    assert home == sources/"runs/smoke/site/index.html"
    return home.parent


def page(built, name):
    return (built/name).read_text(encoding="utf-8")


def article(built, name):
    return re.search(r"<article.*?</article>", page(built, name), re.S)[0]


def words(markup):
    return html.unescape(re.sub(r"<[^>]+>", "", markup))


class Found(HTMLParser):
    "Links, loaded addresses, ids and pictures of a page."

    def __init__(self, markup):
        super().__init__()
        self.links, self.loads, self.ids, self.pictures = [], [], [], []
        self.feed(markup)

    def handle_starttag(self, tag, attrs):
        given = {key: value for key, value in attrs if value}
        self.ids += [given["id"]] if "id" in given else []
        self.loads += [given[key] for key in ("src", "srcset", "data", "poster", "action") if key in given]
        if "href" in given and tag == "a":
            self.links.append(given["href"])
        elif "href" in given:
            self.loads.append(given["href"])
        if tag == "img":
            self.pictures.append(given)


# ---- what is shown

def test_pages_stand_in_the_order_of_the_home_page(sources, toy_library):
    pages = made.collect_pages(sources/"nbs", sources/"runs/smoke")
    assert [p.name for p in pages] == ["index", "tutorials/first", "papers/toy", "aside"]
    assert [p.name for p in pages if p.executed] == ["papers/toy"]
    assert pages[2].module == "toy_library.papers.toy"


def test_a_copy_that_did_not_run_to_its_end_is_not_taken(sources, tmp_path):
    write(tmp_path/"notebooks/toy.ipynb", toy_cells(), papermill={"exception": None, "end_time": None})
    assert not any(p.executed for p in made.collect_pages(sources/"nbs", tmp_path))


def test_a_copy_is_taken_for_the_notebook_that_has_parameters(tmp_path):
    write(tmp_path/"nbs/index.ipynb", [text("# Home")])
    write(tmp_path/"nbs/toy.ipynb", [code("n = 1", metadata={"tags": ["parameters"]})])
    write(tmp_path/"nbs/plain/toy.ipynb", [code("n = 1")])
    write(tmp_path/"run/notebooks/toy.ipynb", [code("n = 2")], papermill={"end_time": "2026-01-01"})
    pages = made.collect_pages(tmp_path/"nbs", tmp_path/"run")
    assert {p.name: p.executed for p in pages} == {"index": False, "toy": True, "plain/toy": False}


def test_the_project_s_own_notebooks_link_to_notebooks_that_exist():
    pages = made.collect_pages()
    names = {p.name for p in pages}
    broken = []
    for p in pages:
        for cell in made.prepare(p, None).cells:
            links = re.findall(r"\]\(([^)\s:]+\.ipynb)", cell.source) if cell.cell_type == "markdown" else []
            places = [urljoin(f"/{p.name}", link).removeprefix("/").removesuffix(".ipynb") for link in links]
            broken += [f"{p.name}: {place}" for place in places if place not in names]
    assert len(names) > 40
    assert broken == []


def test_every_module_that_a_notebook_writes_is_in_the_package():
    modules = [p.module for p in made.collect_pages() if p.module]
    assert [m for m in modules if importlib.util.find_spec(m) is None] == []
    assert len(modules) == len(set(modules)) > 30


# ---- the pages

@needs_sphinx
def test_structure(built):
    files = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    assert {"index.html", "papers/toy.html", "tutorials/first.html", "aside.html", "claims.html", "search.html",
            "searchindex.js", "genindex.html", "api/index.html", "api/toy_library.papers.toy.html",
            "claims/ubt.c01.html", "tables/ubt.table1.csv", "_static/site.css"} <= files
    assert [f for f in files if re.search(r"\.(pickle|doctree|pyc|rst|md)$|\.buildinfo|_sources/", f)] == []
    beside = {p.name for p in built.parent.iterdir()}
    assert beside == {"claims", "claims.csv", "figures", "notebooks", "site", "tables"}
    captions = re.findall(r'class="caption[^>]*><span[^>]*>([^<]+)', page(built, "index.html"))
    assert captions == ["Tutorials", "Papers", "Notebooks", "Reference"]


@needs_sphinx
def test_directives_and_hidden_cells_do_not_show(built):
    body = words(article(built, "papers/toy.html"))
    for hidden in ("#|", "hidden_name", "hidden words", "default_exp", "'mini'", "autolink", "(cell-"):
        assert hidden not in body
    assert "'smoke'" in body
    assert "Outputs of the run smoke" in body
    assert "As committed" in words(article(built, "aside.html"))


@needs_sphinx
def test_the_notebook_can_be_downloaded_as_it_is(built, sources):
    links = [link for link in Found(article(built, "aside.html")).links if link.endswith(".ipynb")]
    assert nbformat.read(built/links[0], 4) == nbformat.read(sources/"nbs/aside.ipynb", 4)


@needs_sphinx
def test_library_code_is_folded_and_examples_are_open(built):
    body = article(built, "papers/toy.html")
    folded = re.findall(r"<details.*?collapsed[^>]*>(.*?)</p>.*?</details>", body, re.S)
    assert folded == ["LIMIT", "Thing, count", "code of this cell"]
    assert "os.getcwd" in words(re.sub(r"<details.*?</details>", "", body, flags=re.S))
    assert body.index("</details>") < body.rindex("<img")


@needs_sphinx
def test_outputs(built):
    body = article(built, "papers/toy.html")
    assert "red &lt;tag&gt; …/x" in body
    assert "a warning" not in body
    assert "<td>wide column</td>" in body
    assert re.search(r"<pre>.*?2\n?.*?</pre>", body[body.rindex("1</span>"):], re.S)
    assert [p["alt"] for p in Found(body).pictures] == [
        'A toy "in" words', "Picture made by the code above, in the section “Pictures”"]


@needs_sphinx
def test_formulas_are_mathml(built):
    body = article(built, "papers/toy.html")
    assert body.count("<math ") == 2
    assert "<mfrac>" in body
    assert 'display="block"' in body
    assert r"\frac" not in body


@needs_sphinx
def test_names_link_to_the_library(built):
    body = article(built, "papers/toy.html")
    entry = "../api/toy_library.papers.toy.html#toy_library.papers.toy"
    prose = set(re.findall(r'<a class="reference internal" href="([^"]+)"><code', body))
    assert {f"{entry}.count", f"{entry}.Thing", f"{entry}.Thing.twice", "../tutorials/first.html"} <= prose
    assert not re.search(r"<a[^>]*><code[^>]*><span[^>]*>no_such_name", body)
    called = re.search(r'<a [^>]*href="([^"]+)"[^>]*><span class="n">count</span></a>', body)
    assert called and called[1] == f"{entry}.count"


@needs_sphinx
def test_the_library_s_pages_have_the_comments_and_lead_to_the_cells(built):
    body = article(built, "api/toy_library.papers.toy.html")
    said = re.sub(r"\s+", " ", words(body))
    for comment in ("in metres, *always*", "how often", "the product", "Things", "where to stop", "how many there are",
                    "the most that may be counted", "Written and explained in the notebook Toy paper"):
        assert comment in said
    assert "_secret" not in said
    assert said.count("size") == 3          # in the signature, as a parameter, and in the words on `twice`
    sources = [link.rpartition("#")[2] for link in Found(body).links if link.startswith("../papers/toy.html#")]
    assert sources == ["cell-00000006"] + ["cell-00000007"]*3
    assert 'href="#toy_library.papers.toy.count"' in body.partition("A thing; see")[2]


@needs_sphinx
def test_every_link_leads_somewhere(built):
    found = {p.relative_to(built).as_posix(): Found(p.read_text(encoding="utf-8")) for p in built.rglob("*.html")}
    broken = []
    for name, about in found.items():
        assert len(about.ids) == len(set(about.ids)), name
        for link in about.links + about.loads:
            if re.match(r"(https?|mailto|data):", link) or link == "#":
                continue
            target = urlsplit(urljoin(f"http://x/{name}", link))
            place, part = unquote(target.path).lstrip("/") or "index.html", unquote(target.fragment)
            if not (built/place).is_file() or (part and part not in found[place].ids):
                broken.append(f"{name} -> {link}")
    assert broken == []
    assert sum(len(about.links) for about in found.values()) > 100


def foreign(folder):
    "Everything that a browser would load from elsewhere, as far as the files say so."
    in_style = r"url\(\s*[\"']?([^\"')]+)|@import\s+[\"']([^\"']+)"
    in_script = r"(?:fetch|import|importScripts|open)\(\s*[\"'`]([^\"'`]+)|\.src\s*=\s*[\"'`]([^\"'`]+)"
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".html", ".css", ".js")):
        content = path.read_text(encoding="utf-8")
        styles = "".join(re.findall(r"<style.*?</style>", content, re.S)) if path.suffix == ".html" else content
        pattern = in_script if path.suffix == ".js" else in_style
        loads = [first or second for first, second in re.findall(pattern, styles)]
        loads += Found(content).loads if path.suffix == ".html" else []
        yield from (f"{path.name}: {u}" for u in loads if re.match(r"(?!data:)[a-z][a-z0-9+.-]*:|//", u.strip()))


@needs_sphinx
def test_nothing_is_loaded_from_elsewhere(built, tmp_path):
    assert list(foreign(built)) == []
    (tmp_path/"a.html").write_text('<script src="https://cdn.example.org/x.js"></script><a href="https://example.org">'
                                   'ok</a><style>@import "//x.org/a.css"; b{background:url(http://y.org/z)}</style>')
    assert len(list(foreign(tmp_path))) == 3


@needs_sphinx
def test_no_folder_of_a_machine_and_no_date(built, sources):
    names = [name.encode() for name in (str(sources), str(ROOT), MACHINE, "site-packages")]
    for path in built.rglob("*"):
        content = path.read_bytes() if path.is_file() else b""
        assert [name for name in names if name in content] == [], path
    assert time.strftime("%b %d, %Y") not in page(built, "index.html")


@needs_sphinx
def test_two_builds_are_the_same(built, sources, toy_library, tmp_path):
    home = made.build_site(sources/"runs", "smoke", tmp_path/"a site", notebooks=sources/"nbs")
    one, two = [{p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
                for folder in (built, home.parent)]
    assert sorted(one) == sorted(two)
    assert [name for name in one if one[name] != two[name]] == []


@needs_sphinx
def test_claims(built):
    body = article(built, "claims.html")
    rows = re.findall(r'<tr id="claim-([\w.]+)" data-paper="(\w+)" data-verdict="(\w+)"', body)
    assert rows == [("ubt.c01", "ubt", "replicated"), ("mem.c01", "mem", "not_replicated")]
    assert read_claims()["ubt.c01"].statement in words(body)
    assert 'href="claims/ubt.c01.html"' in body
    assert 'href="claims/mem.c01.html"' not in body
    assert "&lt;b&gt;" in body
    assert Found(page(built, "claims/ubt.c01.html")).links == ["../tables/ubt.table1.csv", "../claims.html"]


# ---- bad input

@pytest.mark.parametrize("prose, complaint", [
    ("See [it](nowhere.ipynb).", "nowhere"), ("See [it](#no-such-part).", "no-such-part"),
    ("See {py:func}`toy_library.nothing`.", "toy_library.nothing"), (r"A formula: $x^1^2$.", "formula")])
@needs_sphinx
def test_what_leads_nowhere_ends_the_build(sources, toy_library, tmp_path, prose, complaint):
    write(tmp_path/"nbs/index.ipynb", [text("# Home"), text(prose)])
    with pytest.raises(SettingsError, match=rf"(?s)mend what they name:\nindex.*{complaint}"):
        made.build_site(tmp_path/"runs", "smoke", notebooks=tmp_path/"nbs")
    assert list((tmp_path/"runs").rglob("*.html")) == []


@needs_sphinx
def test_bad_input_is_named_before_anything_is_written(sources, tmp_path, capsys):
    nbs, runs = tmp_path/"nbs", tmp_path/"runs"
    shutil.copytree(sources/"nbs", nbs)

    def refused(match, **given):
        with pytest.raises(SettingsError, match=match):
            made.build_site(runs, "smoke", **{"notebooks": nbs, **given})

    refused("no folder", notebooks=tmp_path/"none")
    (nbs/"papers/bad.ipynb").write_text('{"cells": [')
    refused(r"bad\.ipynb cannot be read as a notebook .*restore it")
    (nbs/"papers/bad.ipynb").unlink()
    (runs/"smoke/notebooks").mkdir(parents=True)
    (runs/"smoke/notebooks/toy.ipynb").write_text("[]")
    refused(r"toy\.ipynb cannot be read .*run it again")
    (runs/"smoke/notebooks/toy.ipynb").unlink()
    (runs/"smoke/claims.csv").write_text("id,paper\nubt.c01,ubt\n")
    refused(r"claims\.csv cannot be read")
    (runs/"smoke/claims.csv").unlink()
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/file").write_text("keep")
    refused("holds something else", out=tmp_path/"mine")
    (nbs/"index.ipynb").unlink()
    refused(r"no index\.ipynb")
    assert (tmp_path/"mine/file").read_text() == "keep"
    assert [p.name for p in (runs/"smoke").iterdir()] == ["notebooks"]
    assert made.main(["--profile", "smoke", "--notebooks", str(nbs), "--runs", str(runs)]) == 2
    assert capsys.readouterr().err.startswith("error: no index.ipynb")


def test_without_the_extra_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(made.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SettingsError, match=r"needs sphinx, furo, .*install with: pip install 'mcl_repro\[site\]'"):
        made.build_site(tmp_path, "smoke")


# ---- a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
FLAGS = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run",
         "--remote-debugging-port=0", "--remote-allow-origins=*"]


class Tab:
    "One page of a headless Chromium, spoken to in its own protocol."

    def __init__(self, folder):
        import websocket
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        address = next(match[0] for line in self.process.stderr if (match := re.search(r"ws://\S+", line)))
        self.socket = websocket.create_connection(address, timeout=120)
        self.count, self.events, self.session = 0, [], {}
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = {"sessionId": self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.count += 1
        self.socket.send(json.dumps({"id": self.count, "method": method, "params": params} | self.session))
        while (answer := json.loads(self.socket.recv())).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script):
        result = self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        return result["result"].get("value")

    def until(self, script):
        for _ in range(600):
            if value := self.run(script):
                return value
            time.sleep(.05)
        raise AssertionError(f"never true: {script}")

    def open(self, address, width=1280, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
        colours = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self("Emulation.setEmulatedMedia", features=[colours])
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=address)
        self.until('location.href !== "about:blank" && document.readyState === "complete"')

    def requests(self):
        sent = [e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"]
        return set(sent) - {"about:blank"}

    def complaints(self):
        bad = {"error", "warning", "assert"}
        levels = {"Log.entryAdded": lambda p: p["entry"]["level"], "Runtime.consoleAPICalled": lambda p: p["type"],
                  "Runtime.exceptionThrown": lambda p: "error"}
        told = [(levels[e["method"]], e["params"]) for e in self.events if e.get("method") in levels]
        return [params for level, params in told if level(params) in bad]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("websocket", reason="needs websocket-client, which comes with JupyterLab")
    tab = Tab(tmp_path_factory.mktemp("browser"))
    yield tab
    tab.process.kill()
    tab.process.wait()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture(scope="module", params=["file", "http"])
def address(request, built):
    if request.param == "file":
        yield built.as_uri() + "/"
        return
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@needs_sphinx
def test_in_a_browser(tab, address):
    "No complaint, no request that leaves the folder, nothing wider than a telephone, a search that finds."
    tab.events.clear()
    background = set()
    library = ("api/index", "api/toy_library.papers.toy", "genindex")
    for name in ("index", "papers/toy", "claims", "claims/ubt.c01", *library):
        for dark in (False, True):
            tab.open(f"{address}{name}.html", 390, dark)
            assert tab.run("document.documentElement.scrollWidth") <= 390, name
            if name == "index":
                background.add(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert len(background) == 2      # light and dark
    for word, found in (("Thing", "api/toy_library.papers.toy.html"), ("toy", "papers/toy.html")):
        tab.open(f"{address}search.html?q={word}")
        links = '[...document.querySelectorAll("#search-results a")].map(a => a.getAttribute("href")).join()'
        assert tab.until(f'{links}.includes("{found}")')
    time.sleep(.3)
    assert tab.complaints() == []
    assert [u for u in tab.requests() if not u.startswith((address, "data:"))] == []


@needs_sphinx
def test_folding_and_filtering_in_a_browser(tab, address):
    tab.events.clear()
    tab.open(f"{address}papers/toy.html")
    opened = 'document.querySelectorAll(".cell details[open]").length'
    assert tab.run(opened) == 0
    tab.run('document.querySelector(".fold-all").click()')
    assert tab.run(opened) == 3
    tab.open(f"{address}papers/toy.html#cell-00000007")
    assert tab.until(opened) == 1
    tab.open(f"{address}claims.html")
    rows = '[...document.querySelectorAll("table.claims tbody tr")].filter(r => r.offsetParent !== null)'
    shown = f"{rows}.map(r => r.dataset.paper).join()"
    assert tab.run(shown) == "ubt,mem"
    assert tab.run('document.querySelector(".claims-filter output").textContent') == "2 of 2 claims"
    tab.run('{const s = document.querySelector("[name=verdict]"); s.value = "not_replicated"; '
            's.dispatchEvent(new Event("input", {bubbles: true}))}')
    assert tab.run(shown) == "mem"
    tab.open(f"{address}claims.html?paper=ubt")
    assert tab.run(shown) == "ubt"
    assert tab.complaints() == []


@needs_sphinx
def test_claims_without_javascript(tab, address):
    tab("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(f"{address}claims.html")
        assert tab.run('document.querySelectorAll("table.claims tbody tr").length') == 2
        assert tab.run('getComputedStyle(document.querySelector(".claims-filter")).display') == "none"
    finally:
        tab("Emulation.setScriptExecutionDisabled", value=False)


# ---- the project

def test_the_extra_has_what_the_site_needs():
    settings = (ROOT/"settings.ini").read_text(encoding="utf-8")
    extra = re.search(r"^site_requirements = (.*)$", settings, re.M)[1]
    assert [name for name in PACKAGES.values() if not re.search(rf"(^|\s){name}\b", extra)] == []


def test_make_calls_it():
    command = ["make", "--dry-run", "site", "PROFILE=smoke", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert re.search(r"-m mcl_repro\.(\w+\.)?site --profile smoke", done.stdout)
