"What notebooks store: pictures that fit, text and tables that code hosts show, one form of each output."
import base64
import io

import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from mcl_repro.dev.outputs import FIGURE_LIMIT, plain_html, slim_outputs, slim_png, slim_text


def encoded(image):
    "Bytes as a notebook holds them."
    return base64.b64encode(image).decode()


def opened(data):
    return Image.open(io.BytesIO(base64.b64decode(data)))


def figure():
    "A picture with many colours and a thin green line, on a background that can be seen through."
    drawn, ax = plt.subplots(figsize=(4, 3))
    ax.imshow(np.random.default_rng(0).random((8, 8, 3)))
    ax.plot([0, 7], [0, 7], color="#00ff00")
    out = io.BytesIO()
    drawn.savefig(out, format="png", transparent=True)
    plt.close(drawn)
    return encoded(out.getvalue())


def test_pictures_lose_colours_and_keep_those_that_one_sees():
    data = figure()
    slim = slim_png(data)
    assert slim == slim_png(data)
    assert len(slim) < len(data)
    seen = np.asarray(opened(slim).convert("RGB"), int)
    assert (seen[0, 0] >= 253).all()                                       # on white
    assert (np.abs(seen - [0, 255, 0]).max(2) < 16).sum() > 100            # and the line is green


def test_the_worst_picture_fits():
    noise, out = np.random.default_rng(0).integers(0, 255, (120, 1700, 3), np.uint8), io.BytesIO()
    Image.fromarray(noise).save(out, "PNG")
    slim = slim_png(encoded(out.getvalue()))
    assert len(slim) <= FIGURE_LIMIT
    assert opened(slim).width <= 1600


def forms(**data):
    "The forms that are kept of one output; `text_html` is text/html."
    said = {form.replace("_", "/", 1): value for form, value in data.items()}
    kept = slim_outputs([{"output_type": "display_data", "metadata": {"x": 1}, "data": said}])
    return [set(output["data"]) for output in kept]


TABLE = "<table><tr><td>1</td></tr></table>"
SVG = {"image/svg+xml": "<svg></svg>"}


@pytest.mark.parametrize("given, kept", [
    (dict(text_html=TABLE, text_plain="1", **SVG), [{"text/html", "text/plain"}]),
    (SVG, [{"image/svg+xml"}]),
    (dict(text_html=TABLE, text_plain="1"*2000), [{"text/html"}]),
    (dict(text_html="<script>1</script>", text_plain="left"), [{"text/plain"}]),
    (dict(text_html="<style></style>"), []),
    (dict(text_markdown="# a", text_plain="# a"), [{"text/markdown"}]),
    (dict(text_plain="<Axes: >"), [{"text/plain"}]),
    (dict(application_javascript="1"), []),
    (dict(text_plain=""), []),
])
def test_one_form_of_each_output_is_kept(given, kept):
    assert forms(**given) == kept


def test_what_was_printed_is_kept_without_errors_and_progress():
    printed = [{"output_type": "stream", "name": "stderr", "text": "noise"},
               {"output_type": "stream", "name": "stdout", "text": "1%\r2%\r\n"}]
    assert slim_outputs(printed) == [{"output_type": "stream", "name": "stdout", "text": ["2%\n"]}]


@pytest.mark.parametrize("text, slim", [
    ("a\rb\rc", "c"),
    ("50%\r100%\r\n", "100%\n"),
    ("\x1b[1;31mred\x1b[0m", "red"),
    ("<x at 0x7f12ab>", "<x>"),
    ("/".join(["", "home", "me", "data", "x.csv"]), "…/x.csv"),
    ("open('/tmp/tmp3k/a b')", "open('…/a b')"),
    ("\\".join(["C:", "Users", "me", "x.txt"]), "…/x.txt"),
    ("100%|████| 30/30 [00:02<00:00, 12it/s]\ndone", "done"),
    ("https://example.org/home/x 1/2 and /nowhere", "https://example.org/home/x 1/2 and /nowhere"),
])
def test_text(text, slim):
    assert slim_text(text) == slim


@pytest.mark.parametrize("html, plain", [
    ('<p style="x" onclick="y()">a<br/>b</p>', "<p>a<br>b</p>"),
    ("<script>x</script><style>y</style>z", "z"),
    ('<i aria-hidden="true">a<br><b>b</b></i>c', "c"),
    ('<td colspan="2" class="x">1 &lt; 2</td>', '<td colspan="2">1 &lt; 2</td>'),
    ('<a href="javascript:x">a</a><a href="https://x.org">b</a>', '<a>a</a><a href="https://x.org">b</a>'),
    ('<img src="https://x.org/y.png"><img src="data:image/png;base64,AA">',
     '<img><img src="data:image/png;base64,AA">'),
    ("<unknown>text</unknown></b>", "text</b>"),
    ("<pre>a\n  b</pre>", "<pre>a\n  b</pre>"),
])
def test_html_keeps_what_code_hosts_keep(html, plain):
    assert plain_html(html) == plain
