"""Sphinx extension: the sections of kdx's docstrings as definition lists.

``name : text``, with further lines indented, becomes a term and its definition; section titles
become bold lines.
"""

import re

SECTIONS = ("Attributes", "Examples", "Files", "Parameters", "Raises", "Returns", "Yields")
ENTRY = re.compile(r"(\S.*?) : (.+)")


def plain(app, what, name, obj, options, lines):
    found, section = [], None
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line in SECTIONS and following == "-" * len(line):
            section = line
            found += [f"**{line}**", ""]
        elif section and line == "-" * len(section):
            continue
        elif section and section != "Examples" and (entry := ENTRY.fullmatch(line)):
            found += ["", f"``{entry[1]}``", f"    {entry[2]}"]
        else:
            found.append(line)
    lines[:] = found


def setup(app):
    app.connect("autodoc-process-docstring", plain)
    return {"parallel_read_safe": True}
