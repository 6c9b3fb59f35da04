"""Sphinx extension: citations are items of their list; the role that docutils gives them is none of a list's."""


def setup(app):
    def add(app, pagename, templatename, context, doctree):
        if "body" in context:
            context["body"] = context["body"].replace('role="doc-biblioentry"', 'role="listitem"')

    app.connect("html-page-context", add)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
