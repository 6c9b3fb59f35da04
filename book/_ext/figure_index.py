"""Sphinx extension: the directive ``figure-index``, on one page, lists the figures of all executed pages by their alt
texts, with links to them."""

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

INDEX = "book/figures"
PAGES = "book/executed/"


class FigureIndex(SphinxDirective):
    def run(self):
        return [nodes.bullet_list("", figure_index=True)]


def number_figures(app, doctree):
    """Put a target before each picture of a page. An id of its own would be the link's too, which Sphinx draws around
    it."""
    page = app.env.docname
    if page.startswith(PAGES):
        for number, image in enumerate(list(doctree.findall(nodes.image)), 1):
            image["figure"] = f"figure-{page.removeprefix(PAGES)}-{number}"
            image.parent.insert(image.parent.index(image), nodes.target("", "", ids=[image["figure"]]))


def figures(app, page):
    """Links to the figures of a page; the pictures of a cell have one text, and one link."""
    first = {}
    for image in app.env.get_doctree(page).findall(nodes.image):
        first.setdefault(image.get("alt"), image["figure"])
    address = app.builder.get_relative_uri(INDEX, page)
    links = [nodes.reference("", text, refuri=f"{address}#{name}", internal=True) for text, name in first.items()]
    return nodes.bullet_list("", *(nodes.list_item("", nodes.paragraph("", "", link)) for link in links))


def fill(app, doctree, docname):
    """Put the figures of all pages into the list, in the order of the book."""
    for index in [of for of in doctree.findall(nodes.bullet_list) if of.get("figure_index")]:
        for page in app.env.collect_relations():
            if page.startswith(PAGES) and len(found := figures(app, page)):
                title = nodes.strong("", app.env.titles[page].astext())
                index += nodes.list_item("", nodes.paragraph("", "", title), found)


def renew(app, env):
    """The index is written again whatever page has changed."""
    return [INDEX]


def setup(app):
    app.add_directive("figure-index", FigureIndex)
    app.connect("doctree-read", number_figures)
    app.connect("doctree-resolved", fill)
    app.connect("env-updated", renew)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
