"""Sphinx extension: the foot of each page says what it was built from, and how to cite it."""

import html
import os
import re
import time
from functools import cache

from kdx.distil.run_store import versions
from kdx.distil.shipped import commit
from kdx.version import __version__

PROFILE = "KDX_PROFILE"  # set by `kdx book`


@cache
def built(profile):
    """What all pages are built from."""
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    source = f"Built on {time.strftime('%Y-%m-%d')} from commit {commit() or 'unknown'}"
    return f"{source}{f' with the profile {profile}' if profile else ''}: kdx {__version__}, {used}."


def foot(title, book, author, profile):
    """HTML of the foot of a page."""
    cited = f"{author} ({time.strftime('%Y')}). {title}. In: {book}, version {__version__}."
    return (
        f'<footer class="built-from"><p>{html.escape(built(profile))}</p>'
        f"<p>Cite this page: {html.escape(cited)}</p></footer>"
    )


def setup(app):
    def add(app, pagename, templatename, context, doctree):
        if doctree is not None:
            title = html.unescape(re.sub("<[^>]+>", "", context["title"]))
            context["body"] += foot(title, app.config.html_title, app.config.author, os.environ.get(PROFILE, ""))

    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
