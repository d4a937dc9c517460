"""The site: a small one is built once from notebooks made here and a real one, then read page by page, and opened in a
browser where there is one.
"""
import ast, base64, functools, html, http.server, importlib.util, inspect, json, os, re, shutil, subprocess, sys
import threading, time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urljoin, urlsplit

import nbformat
import pytest
from nbformat.v4 import new_code_cell as code, new_markdown_cell as text, new_notebook, new_output as output

from mcl_repro.dev import site as made
from mcl_repro.core.errors import SettingsError
from mcl_repro.report.printed import printed_entries
from mcl_repro.report.tables import tidy

ROOT = Path(__file__).resolve().parent.parent
needs_sphinx = pytest.mark.skipif(
    any(importlib.util.find_spec(p) is None for p in ("sphinx", "furo", "myst_parser")),
    reason="needs the extra: pip install 'mcl_repro[site]'",
)
PNG = base64.b64encode(
    base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg==")
).decode()
TABLE = (
    '<style>.a{color:red}</style><table border="1" class="dataframe"><tbody><tr>'
    + "".join(f"<td>wide column {i}</td>" for i in range(40))
    + '</tr></tbody></table><img src="data:image/png;base64,%s"><script>document.title="taken"</script>' % PNG
)


def toy():
    "A paper's notebook as a run leaves it."
    return [
        text("# Toy paper\n\n> A toy."),
        text(
            "Needs $\\theta_p$, `mcl_repro.model.clip.info_nce`, `load_profile`, `main`, `no_such_name` and [the "
            "command line](main.ipynb); see [the licence](../LICENSE).\n\n$$\\frac{a}{b} = \\sum_i "
            "x_i$$\n\n\\begin{align}\nx &= 1\n\\end{align}"
        ),
        code('profile = "mini"\nruns = "../runs"', metadata={"tags": ["parameters"]}),
        code(
            '# Parameters\nprofile = "smoke"\nruns = "/data/somebody/runs"', metadata={"tags": ["injected-parameters"]}
        ),
        code("#| default_exp errors"),
        code("#| export\nimport os"),
        code("#| hide\nhidden_name = 1", outputs=[output("stream", text="hidden words")]),
        text("## Errors\n\n| a | b |\n|---|---|\n| `DataError` | x |"),
        code(
            '#| export\nclass DataError(UserError): "Data that is missing."\n\nclass SettingsError(UserError): '
            '"Unknown."'
        ),
        code(
            'from mcl_repro.lab.profiles import load_profile\nfrom mcl_repro import report\nload_profile("smoke"); '
            "tidy; train = 1; train",
            outputs=[
                output("stream", text="\x1b[31mred\x1b[0m <tag>\n"),
                output("stream", name="stderr", text="/data/somebody/runs/smoke/x.png"), output("stream", text=" \n"),
            ],
        ),
        code(
            'save_figure(fig, "ubt.toy", folder)\nfig',
            outputs=[output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})],
        ),
        code("fig", outputs=[output("display_data", {"image/png": PNG, "text/plain": "<Figure>"})]),
        code("df", outputs=[output("execute_result", {"text/html": TABLE, "text/plain": ""})]),
        code("1 + 1", outputs=[output("execute_result", {"text/plain": "2"})]),
    ]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    top = tmp_path_factory.mktemp("sources")
    nbs, run = top/"nbs", top/"runs/smoke"
    for folder in (nbs, run/"notebooks", run/"figures", run/"claims", run/"tables"):
        folder.mkdir(parents=True)
    shutil.copy(ROOT/"nbs/main.ipynb", nbs)
    write(
        nbs / "index.ipynb",
        [
            text("# Home\n\n> Of a toy."),
            text(
                "Read [10_toy](nbs/10_toy.ipynb) and [nbdev](https://nbdev.fast.ai).\n\n```python\nfrom "
                'mcl_repro.lab.lab import Lab\nLab("smoke")\n```'
            ),
        ],
    )
    write(nbs/"10_toy.ipynb", [c for c in toy() if "injected-parameters" not in c.metadata.get("tags", [])])
    write(
        run / "notebooks/toy.ipynb", toy(),
        papermill={"exception": None, "end_time": "2026-01-01", "parameters": {"runs": "/data/somebody/runs"}},
    )
    (run/"figures/ubt.toy.json").write_text(json.dumps({"id": "ubt.toy", "alt": 'A toy "in" words'}))
    (run / "claims.csv").write_text(
        "id,paper,audit,verdict,margin,evidence\nubt.c01,ubt,holds,reproduced,+1.2,Table "
        "1\nmem.c01,mem,fails,contradicted,,<b>\n"
    )
    (run / "claims/ubt.c01.html").write_text(
        '<!doctype html><html><head><meta name="viewport" '
        'content="width=device-width"><title>c</title></head><a href="../tables/ubt.table1.csv">t</a><a '
        'href="../index.html#x">r</a><a href="../notebooks/toy.html">n</a><a href="../../secret.txt">s</a>'
    )
    (run/"tables/ubt.table1.csv").write_text("1\n")
    return top


def write(path, cells, **meta):
    nb = new_notebook(
        cells=cells,
        metadata={"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}, **meta},
    )
    for i, c in enumerate(nb.cells):
        c["id"] = f"{i:08x}"
    nbformat.write(nb, path)


# modules that the small site describes: all of them would take most of the time
FEW = ("batch", "cli", "clip", "errors", "lab", "report")

@pytest.fixture(scope="module")
def built(sources):
    said, few = [], {n: m for n, m in made.library().items() if n in FEW}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(made, "library", lambda: few)
        home = made.build_site(sources/"runs", "smoke", notebooks=sources/"nbs", say=said.append)
    assert home == sources/"runs/smoke/site/index.html" and not [l for l in said if "warning" in l]
    return home.parent


def page(built, name):
    return (built/name).read_text(encoding="utf-8")
def article(built, name):
    return re.search(r"<article.*?</article>", page(built, name), re.S)[0]


class Found(HTMLParser):
    "Links, loaded addresses, ids and pictures of a page."
    def __init__(self, text):
        super().__init__()
        self.links, self.loads, self.ids, self.pictures = [], [], [], []
        self.feed(text)
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get("id"):
            self.ids.append(a["id"])
        if tag == "a" and "href" in a:
            self.links.append(a["href"])
        self.loads += [a[k] for k in ("src", "srcset", "data", "poster", "action") if a.get(k)] + (
            [a["href"]] if tag in ("link", "use", "image", "base") and a.get("href") else []
        )
        self.loads += re.findall(r'url\(\s*["\']?([^"\')]+)', a.get("style") or "")
        if tag == "img":
            self.pictures.append(a)


# ---- reading the library

def test_comments_are_read_as_fastcore_reads_them():
    "Live objects through fastcore's docments say the same as the text does."
    from fastcore.docments import docments
    compared = 0
    for name in ("report", "batch", "cli", "site", "metrics"):
        module = importlib.import_module(f"mcl_repro.{name}")
        for d in made.library()[name].definitions.values():
            live = getattr(module, d.name, None)
            if (
                d.kind != "function"
                or not d.public
                or not inspect.isfunction(live)
                or inspect.signature(live) != inspect.signature(inspect.unwrap(live))
            ):
                continue
            told = docments(live, args_kwargs=True)
            assert dict(d.parameters) == {k: " ".join(v.split()) for k, v in told.items() if v and k != "return"}, d.id
            if told.get("return"):
                assert d.returns == told["return"], d.id
            compared += len(d.parameters)
    assert compared > 80


def test_every_name_that_nbdev_knows_is_known():
    index = ast.literal_eval(
        re.sub(r"^.*?d = ", "", (ROOT / "mcl_repro/_modidx.py").read_text(encoding="utf-8"), flags=re.S)
    )["syms"]
    known = {d.id for m in made.library().values() for d in m.definitions.values()}
    assert sorted(n for names in index.values() for n in names if n not in known) == [] and len(known) > 500


def test_what_all_lists_is_public_and_nothing_else_at_the_top():
    for name, module in made.library().items():
        every = next(
            ast.literal_eval(n.value)
            for n in ast.parse(module.text).body
            if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "__all__"
        )
        assert {d.name for d in module.definitions.values() if d.public and "." not in d.name} == {
            n for n in every if not n.startswith("_")
        }, name


def test_nothing_is_imported_to_build():
    done = subprocess.run(
        [
            sys.executable, "-c",
            'import sys; from mcl_repro.dev.site import library; library(); print("torch" in sys.modules)',
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.stdout.strip() == "False", done.stderr


@pytest.mark.parametrize("source, exported, expected", [
    ('load_profile("x")', False, ["lab.load_profile"]), ("x.load_profile()", False, []), ("f(load_profile=1)", False, []), ("def f(load_profile): return load_profile", False, []),
    ('f"{load_profile}"', False, ["lab.load_profile"]), ("%time load_profile()", False, []), ("@load_profile\ndef g(): pass", False, ["lab.load_profile"]), ("report.tidy", False, ["report.", "report.tidy"]),
    ("def load_profile(): pass\nload_profile()", False, [])])
def test_names_link_only_where_they_mean_it(source, exported, expected):
    scope = made.Scope(["from mcl_repro.lab.profiles import load_profile\nfrom mcl_repro import report"])
    assert [f"{m}.{n}" for _, _, (m, n), _ in made.mentions(source, scope, exported)] == expected


# ---- the pages

@needs_sphinx
def test_structure(built):
    files = {p.relative_to(built).as_posix() for p in built.rglob("*") if p.is_file()}
    assert {
        "index.html", "10_toy.html", "main.html", "claims.html", "search.html", "searchindex.js", "genindex.html",
        "api/index.html", "claims/ubt.c01.html", "tables/ubt.table1.csv", "notebooks/10_toy.ipynb", "_static/site.css",
        *(f"api/{m}.html" for m in FEW),
    } <= files
    assert not [f for f in files if re.search(r"\.(pickle|doctree|pyc)$|\.buildinfo|_sources/|\.rst|\.md$", f)]
    assert sorted(p.name for p in built.parent.iterdir()) == [
        "claims", "claims.csv", "figures", "notebooks", "site", "tables",
    ]
    assert [html.unescape(t) for t in re.findall(r'class="caption[^>]*><span[^>]*>([^<]+)', page(built, "index.html"))][
        :3
    ] == ["Papers", "Running it", "Reference"]


@needs_sphinx
def test_directives_and_hidden_cells_do_not_show(built):
    body = article(built, "10_toy.html")
    assert (
        "#|" not in body
        and "# |" not in body
        and "hidden_name" not in body
        and "hidden words" not in body
        and "default_exp" not in body
    )
    assert "smoke" in body and "mini" not in body       # the injected parameters stand for the defaults
    assert "Outputs of the run <code>smoke</code>" in body and "As committed" in article(built, "main.html")


@needs_sphinx
def test_library_code_is_folded_and_examples_are_open(built):
    body = article(built, "10_toy.html")
    folded = re.findall(r'<details class="exported"><summary>(.*?)</summary>(.*?)</details>', body, re.S)
    assert [re.sub("<[^>]+>", "", s) for s, _ in folded] == [
        "imports",
        "DataError, SettingsError – Data that is missing, unreadable or not what it claims to be".replace(" – ", " "),
    ]
    assert (
        'id="def-DataError"' in folded[1][1]
        and 'href="api/errors.html#mcl_repro.core.errors.DataError"' in folded[1][1]
    )
    opened = re.sub(r"<details.*?</details>", "", body, flags=re.S)
    assert (
        "load_profile" in opened
        and '<pre class="output result">2</pre>' in opened
        and body.count("<details") == body.count("</details>")
    )


@needs_sphinx
def test_names_lead_to_entries_and_entries_to_definitions(built):
    body = article(built, "10_toy.html")
    for place in (
        "api/clip.html#mcl_repro.model.clip.info_nce",
        "api/lab.html#mcl_repro.lab.profiles.load_profile",
        "main.html",
        "api/report.html#mcl_repro.report.tables.tidy",
        "api/errors.html#mcl_repro.core.errors.DataError",
    ):
        assert re.search(rf'<a [^>]*href="{re.escape(place)}#?"', body), place
    assert "no_such_name" in body and not re.search(r"<a[^>]*>[^/]*no_such_name", body)
    assert 'href="../main.html#def-parse_pairs"' in page(
        built, "api/cli.html"
    ) and 'href="../10_toy.html#def-DataError"' in page(built, "api/errors.html")
    assert 'api/lab.html#mcl_repro.lab.lab.Lab"' in article(built, "index.html")
    entry = re.search(r'id="mcl_repro.core.words.parse_pairs".*?</dl>\s*</dd>', page(built, "api/cli.html"), re.S)[0]
    assert (
        "the values given for a repeatable option" in re.sub("<[^>]+>", "", entry).lower()
        and "for the error" in entry
        and "name -&gt; value" in entry
        and "--" not in re.sub("<[^>]+>", "", entry)
    )


@needs_sphinx
def test_every_link_leads_somewhere(built):
    found = {p.relative_to(built).as_posix(): Found(p.read_text(encoding="utf-8")) for p in built.rglob("*.html")}
    broken = []
    for name, f in found.items():
        assert len(f.ids) == len(set(f.ids)), (name, [i for i in f.ids if f.ids.count(i) > 1][:3])
        for link in f.links + f.loads:
            if re.match(r"(https?|mailto|data):", link) or link == "#":
                continue
            target = urlsplit(urljoin(f"http://x/{name}", link))
            place = unquote(target.path).lstrip("/") or "index.html"
            if not (built/place).is_file() or (target.fragment and unquote(target.fragment) not in found[place].ids):
                broken.append(f"{name} -> {link}")
    assert broken == [] and sum(len(f.links) for f in found.values()) > 500


@needs_sphinx
def test_formulas_are_mathml(built):
    body = article(built, "10_toy.html")
    assert (
        body.count("<math ") == 3
        and "<mfrac>" in body
        and 'display="block"' in body
        and r"\frac" not in body
        and "$" not in re.sub(r"<pre.*?</pre>", "", body, flags=re.S)
    )


@needs_sphinx
def test_outputs(built):
    body = article(built, "10_toy.html")
    assert (
        '<span class="ansi-red-fg">red</span> &lt;tag&gt;' in body
        and '<div class="output scroll">' in body
        and "taken" not in body
        and "<Figure" not in body
    )
    alts = [html.unescape(p.get("alt", "")) for p in Found(body).pictures]
    assert alts == [
        'A toy "in" words', "Picture made by the code above, in the section “Errors”",
        "Picture made by the code above, in the section “Errors”",
    ]
    assert "table-wrapper" in body and len(list((built/"_images").iterdir())) == 1


@needs_sphinx
def test_claims(built):
    body = article(built, "claims.html")
    rows = re.findall(r'<tr id="claim-([\w.]+)" data-paper="(\w+)" data-verdict="(\w+)"', body)
    assert rows == [("ubt.c01", "ubt", "reproduced"), ("mem.c01", "mem", "contradicted")]
    assert (
        html.escape(printed_entries("claims")["ubt.c01"]["statement"], quote=False)[:40] in html.unescape(body)
        and 'href="claims/ubt.c01.html"' in body
        and 'href="claims/mem.c01.html"' not in body
        and "&lt;b&gt;" in body
    )
    assert Found(page(built, "claims/ubt.c01.html")).links == [
        "../tables/ubt.table1.csv", "../claims.html", "../10_toy.html", "../claims.html",
    ]


def foreign(built):
    "Everything that a browser would load from elsewhere."
    for p in sorted(q for q in built.rglob("*") if q.suffix in (".html", ".css", ".js", ".svg")):
        content = p.read_text(encoding="utf-8")
        if p.suffix == ".html":
            loads = Found(content).loads + [
                u
                for s in re.findall(r"<style.*?</style>", content, re.S)
                for u in re.findall(r'url\(\s*["\']?([^"\')]+)', s) + re.findall(r'@import\s+["\']([^"\']+)', s)
            ]
        elif p.suffix == ".js":
            loads = re.findall(
                r"""(?:fetch|import|importScripts|open)\(\s*["'`]([^"'`]+)|\.src\s*=\s*["'`]([^"'`]+)""", content
            ) and [
                a or b
                for a, b in re.findall(
                    r"""(?:fetch|import|importScripts|open)\(\s*["'`]([^"'`]+)|\.src\s*=\s*["'`]([^"'`]+)""", content
                )
            ]
        else:
            loads = (
                re.findall(r'url\(\s*["\']?([^"\')]+)', content)
                + re.findall(r'@import\s+["\']([^"\']+)', content)
                + re.findall(r'(?:xlink:)?href="([^"#]+)', content)
            )
        yield from (
            f"{p.relative_to(built)}: {u}" for u in loads if re.match(r"(?!data:)[a-z][a-z0-9+.-]*:|//", u.strip())
        )


@needs_sphinx
def test_nothing_is_loaded_from_elsewhere(built, tmp_path):
    assert list(foreign(built)) == []
    (tmp_path / "a.html").write_text(
        '<script src="https://cdn.example.org/x.js"></script><a '
        'href="https://example.org">ok</a><style>@import "//x.org/a.css"; '
        "b{background:url(http://y.org/z)}</style>"
    )
    assert len(list(foreign(tmp_path))) == 3


@needs_sphinx
def test_no_folder_of_this_machine_and_no_date(built, sources):
    names = [str(sources), str(ROOT), "/data/somebody", "site-packages"]
    for p in built.rglob("*"):
        if p.is_file():
            assert [n for n in names if n.encode() in p.read_bytes()] == [], p
    assert time.strftime("%b %d, %Y") not in page(built, "index.html")


@needs_sphinx
def test_two_builds_are_the_same(built, sources, tmp_path):
    "Also with another order of hashes, in another process, into another folder."
    script = (
        "import sys\nfrom mcl_repro import site\nfew = {n: m for n, m in site.library().items() if n in "
        f"{FEW}}}\nsite.library = lambda: few\nsys.exit(site.main(sys.argv[1:]))"
    )
    command = [
        sys.executable, "-c", script, "--profile", "smoke", "--runs", str(sources / "runs"), "--notebooks",
        str(sources / "nbs"), "--out", str(tmp_path / "a site"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}, capture_output=True,
        text=True, timeout=600,
    )
    assert done.returncode == 0 and done.stdout == f"site: {tmp_path/'a site/index.html'}\n", done.stderr
    assert len(done.stderr.splitlines()) == 3
    contents = lambda folder: {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }
    one, two = contents(built), contents(tmp_path/"a site")
    assert sorted(one) == sorted(two) and [n for n in one if one[n] != two[n]] == []


# ---- bad input

@needs_sphinx
def test_bad_input_is_named_before_anything_is_written(sources, tmp_path, capsys):
    nbs, runs = tmp_path/"nbs", tmp_path/"runs"
    shutil.copytree(sources/"nbs", nbs)
    build = lambda **kw: made.build_site(runs, "smoke", **{"notebooks": nbs, **kw})
    with pytest.raises(SettingsError, match="no folder"):
        build(notebooks=tmp_path/"none")
    (nbs/"11_bad.ipynb").write_text('{"cells": [')
    with pytest.raises(SettingsError, match=r"11_bad\.ipynb cannot be read as a notebook .*restore it"):
        build()
    (nbs/"11_bad.ipynb").unlink()
    (runs/"smoke/notebooks").mkdir(parents=True)
    (runs/"smoke/notebooks/toy.ipynb").write_text("[]")
    with pytest.raises(SettingsError, match=r"toy\.ipynb cannot be read .*mcl_repro run"):
        build()
    (runs/"smoke/notebooks/toy.ipynb").unlink()
    (runs/"smoke/claims.csv").write_text("id,paper\nubt.c01,ubt\n")
    with pytest.raises(SettingsError, match=r"claims\.csv"):
        build()
    (runs/"smoke/claims.csv").unlink()
    (nbs/"index.ipynb").unlink()
    with pytest.raises(SettingsError, match=r"no index\.ipynb"):
        build()
    (tmp_path/"mine").mkdir()
    (tmp_path/"mine/file").write_text("keep")
    with pytest.raises(SettingsError, match="holds something else"):
        build(out=tmp_path/"mine")
    assert (
        not (runs / "smoke/site").exists()
        and (tmp_path / "mine/file").read_text() == "keep"
        and not list(runs.rglob(".site-*"))
    )
    assert made.main(
        ["--profile", "smoke", "--notebooks", str(nbs), "--runs", str(runs)]
    ) == 2 and capsys.readouterr().err.startswith("error: no index.ipynb")


def test_without_the_extra_it_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(made.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        SettingsError, match=r"needs sphinx, furo, myst_parser; install with: pip install 'mcl_repro\[site\]'"
    ):
        made.build_site(tmp_path, "smoke")


def test_an_unfinished_copy_is_not_taken(sources, tmp_path):
    (tmp_path/"notebooks").mkdir()
    write(tmp_path/"notebooks/toy.ipynb", toy(), papermill={"exception": None, "end_time": None})
    assert not any(p.executed for p in made.collect_pages(sources / "nbs", tmp_path)) and any(
        p.executed for p in made.collect_pages(sources / "nbs", sources / "runs/smoke")
    )


# ---- a browser

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)


class Tab:
    "One page of a headless Chromium, spoken to in its own protocol."
    def __init__(self, folder):
        import websocket
        self.process = subprocess.Popen(
            [
                CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                "--no-first-run", "--remote-debugging-port=0", "--remote-allow-origins=*", f"--user-data-dir={folder}",
                "about:blank",
            ],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        address = next(m[0] for line in self.process.stderr if (m := re.search(r"ws://\S+", line)))
        self.socket = websocket.create_connection(address, timeout=120)
        self.count = 0
        self.events = []
        self.session = None
        target = self("Target.createTarget", url="about:blank")["targetId"]
        self.session = self("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self(f"{domain}.enable")

    def __call__(self, method, **params):
        self.count += 1
        self.socket.send(
            json.dumps(
                {"id": self.count, "method": method, "params": params}
                | ({"sessionId": self.session} if self.session else {})
            )
        )
        while (answer := json.loads(self.socket.recv())).get("id") != self.count:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def run(self, script):
        return self("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)["result"].get("value")

    def open(self, address, width=1280, dark=False):
        self("Emulation.setDeviceMetricsOverride", width=width, height=844, deviceScaleFactor=1, mobile=width < 600)
        self(
            "Emulation.setEmulatedMedia",
            features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}],
        )
        self("Page.navigate", url="about:blank")
        self("Page.navigate", url=address)
        for _ in range(600):
            if self.run('location.href !== "about:blank" && document.readyState === "complete"'):
                return
            time.sleep(.05)
        raise AssertionError(f"{address} does not load")

    def until(self, script):
        for _ in range(600):
            if value := self.run(script):
                return value
            time.sleep(.05)
        raise AssertionError(f"never true: {script}")

    def requests(self):
        return {
            e["params"]["request"]["url"] for e in self.events if e.get("method") == "Network.requestWillBeSent"
        } - {"about:blank"}
    def complaints(self):
        return [
            e["params"]
            for e in self.events
            if e.get("method") == "Runtime.exceptionThrown"
            or (e.get("method") == "Log.entryAdded" and e["params"]["entry"]["level"] in ("error", "warning"))
            or (e.get("method") == "Runtime.consoleAPICalled" and e["params"]["type"] in ("error", "warning", "assert"))
        ]


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("websocket", reason="needs websocket-client, which comes with JupyterLab")
    tab = Tab(tmp_path_factory.mktemp("browser"))
    yield tab
    tab.process.kill()
    tab.process.wait()


@pytest.fixture(scope="module", params=["file", "http"])
def address(request, built):
    if request.param == "file":
        yield built.as_uri() + "/"
        return
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(built)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/"
    server.shutdown()
    server.server_close()


@needs_sphinx
def test_in_a_browser(tab, address):
    """No complaint, no request that leaves the folder, no page that scrolls sideways on a telephone, a search that
    finds.
    """
    tab.events.clear()
    background = set()
    for name in (
        "index.html", "10_toy.html", "main.html", "api/cli.html", "api/index.html", "claims.html", "genindex.html",
        "claims/ubt.c01.html",
    ):
        for dark in (False, True):
            tab.open(address + name, 390, dark)
            assert tab.run("document.documentElement.scrollWidth") <= 390, name
            if name == "index.html":
                background.add(tab.run("getComputedStyle(document.body).backgroundColor"))
    assert len(background) == 2      # light and dark
    tab.open(f"{address}search.html?q=parse_pairs")
    assert "parse_pairs" in tab.until(
        'document.querySelector("#search-results li") && '
        'document.querySelector("#search-results").innerText.includes("parse_pairs") && '
        'document.querySelector("#search-results").innerText'
    )
    tab.open(f"{address}search.html?q=toy")
    assert tab.until(
        '[...document.querySelectorAll("#search-results a")].map(a => '
        'a.getAttribute("href")).join().includes("10_toy.html")'
    )
    time.sleep(.3)
    assert tab.complaints() == []
    assert [u for u in tab.requests() if not u.startswith((address, "data:"))] == []


@needs_sphinx
def test_folding_and_filtering_in_a_browser(tab, address):
    tab.events.clear()
    tab.open(f"{address}10_toy.html")
    fold = 'document.querySelectorAll("details.exported[open]").length'
    assert tab.run(fold) == 0
    tab.run('document.querySelector(".fold-all").click()')
    assert tab.run(fold) == 2
    tab.open(f"{address}10_toy.html#def-SettingsError")
    assert tab.until(fold) == 1
    tab.open(f"{address}claims.html")
    shown = (
        '[...document.querySelectorAll("table.claims tbody tr")].filter(r => r.offsetParent !== null).map(r => '
        "r.dataset.paper).join()"
    )
    assert (
        tab.run(shown) == "ubt,mem"
        and tab.run('document.querySelector(".claims-filter output").textContent') == "2 of 2 claims"
    )
    tab.run(
        '{const s = document.querySelector("[name=verdict]"); s.value = "contradicted"; s.dispatchEvent(new '
        'Event("input", {bubbles: true}))}'
    )
    assert tab.run(shown) == "mem"
    tab.open(f"{address}claims.html?paper=ubt")
    assert tab.run(shown) == "ubt"
    assert tab.complaints() == []


@needs_sphinx
def test_claims_without_javascript(tab, address):
    tab("Emulation.setScriptExecutionDisabled", value=True)
    try:
        tab.open(f"{address}claims.html")
        assert (
            tab.run('document.querySelectorAll("table.claims tbody tr").length') == 2
            and tab.run('getComputedStyle(document.querySelector(".claims-filter")).display') == "none"
        )
    finally:
        tab("Emulation.setScriptExecutionDisabled", value=False)


# ---- the project

def test_the_extra_and_the_command_are_where_make_looks():
    settings = (ROOT/"settings.ini").read_text(encoding="utf-8")
    make = (ROOT/"Makefile").read_text(encoding="utf-8")
    assert re.search(r"^site_requirements = .*sphinx.*furo.*myst-parser", settings, re.M)
    assert re.search(r"\.\[dev,cluster,site", make) and re.search(r"^\.PHONY:.*\bsite\b", make, re.M)
    done = subprocess.run(
        ["make", "--dry-run", "site", "PROFILE=smoke", f"PYTHON={sys.executable}"], cwd=ROOT, capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "-m mcl_repro.dev.site --profile smoke" in done.stdout, done.stderr
