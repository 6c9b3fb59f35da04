"""The verdicts of the pages on photographs, for machines without these: ``python tests/benchmarks/quotes.py``.

Takes them from the executed pages of the shipped profile, so run ``make book`` with the photographs first.
"""

import time

from kdx.pages import build, results

if __name__ == "__main__":
    start = time.perf_counter()
    pages = build.load_pages(build.find_root(), "shipped")
    table = build.quotes([page for page in pages if build.has_photographs(page)])
    results.store(build.QUOTES, table, "python tests/benchmarks/quotes.py", time.perf_counter() - start)
    print(table.to_string())
