import base64
import re

import matplotlib.pyplot as plt
import pandas as pd

from kdx.pages import html_pages


def test_a_page_is_whole_and_its_text_no_markup():
    page = html_pages.page("a < b", "<main>body</main>", "kdx explain --data 'a&b'")
    assert page.startswith("<!DOCTYPE html>")
    assert "<title>a &lt; b</title>" in page
    assert '<meta name="viewport"' in page
    assert "<code>kdx explain --data &#x27;a&amp;b&#x27;</code>" in page
    assert "<footer>" not in html_pages.page("a", "b")
    assert html_pages.listed(["<b>", "c"]) == "<ul><li>&lt;b&gt;</li><li>c</li></ul>"


def test_a_picture_is_embedded_and_its_figure_closed():
    figure, _ = plt.subplots(figsize=(1, 1))
    text = html_pages.picture(figure, 'the "alt" of it')
    assert not plt.fignum_exists(figure.number)
    assert 'alt="the &quot;alt&quot; of it"' in text
    assert base64.b64decode(re.search('base64,([^"]+)', text)[1]).startswith(b"\x89PNG")


def test_a_table_escapes_and_rounds():
    text = html_pages.table(pd.DataFrame({"class": ["<i>"], "p": [0.12345], "q": [float("nan")], "r": ["1\n2"]}))
    assert "&lt;i&gt;" in text
    assert "<td>0.123</td>" in text
    assert "<td></td>" in text
    assert "<td>1\n2</td>" in text
