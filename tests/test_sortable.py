import math

import pandas as pd
import pytest

from kdx.pages.sortable import sortable

TABLE = pd.DataFrame({"name": ["a <b>", "c", "d", "e"], "score": [0.5, 10.0, math.nan, 9.0], "place": [2, 1, 4, 3]})


def test_cells_are_escaped_and_keep_their_values():
    text = sortable(TABLE, {"score": ["half", "ten", "none", "nine"]}, caption="x & y", code=["place"]).data
    assert '<th scope="row" data-value="a &lt;b&gt;">a &lt;b&gt;</th>' in text
    assert '<td data-value="10.0">ten</td>' in text
    assert '<td data-value="">none</td>' in text
    assert "<caption>x &amp; y</caption>" in text
    assert '<td data-value="2"><code>2</code></td>' in text
    assert "://" not in text


@pytest.mark.browser
def test_a_click_sorts_numbers_as_numbers_and_leaves_what_is_missing_at_the_end(browser, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(
        f"<!doctype html><html lang=en><title>t</title>{sortable(TABLE, caption='x', ascending=['place']).data}"
    )
    browser.get(path.as_uri())
    names = "return [...document.querySelectorAll('tbody th')].map(e => e.textContent[0]).join('')"
    order = []
    for column in (1, 1, 2, 0, 0):
        browser.execute_script(f"document.querySelectorAll('thead button')[{column}].click()")
        order.append(browser.execute_script(names))
    assert order == ["cead", "aecd", "caed", "edca", "acde"]
    assert browser.execute_script("return document.querySelector('thead th').ariaSort") == "ascending"
