"""Sphinx extension: pages without sphinx-thebe.

Jupyter Book always loads it; it declares its scripts, which live on another host, twice on
every page, and the browser reports an error. The book runs no code in the browser.
"""


def setup(app):
    def disconnect(app):
        for event, listeners in app.events.listeners.items():
            app.events.listeners[event] = [x for x in listeners if not x.handler.__module__.startswith("sphinx_thebe")]

    app.connect("builder-inited", disconnect, priority=0)
    return {"parallel_read_safe": True}
