"""`python -m benchmarks.families [NAME ...]`: the table of model families, printed row by row and written as a page.

Ends with status 1 if a row fails.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from benchmarks.families.configurations import names
from benchmarks.families.measure import DTYPES
from benchmarks.families.pages import counts, line, page
from benchmarks.families.worker import measured

PAGE = Path(__file__).parents[2] / "docs" / "families.md"


def main() -> int:
    options = argparse.ArgumentParser(prog="python -m benchmarks.families", description=__doc__)
    options.add_argument("names", nargs="*", help="rows, as 'llama' or 'llama: tied'; all without")
    options.add_argument("--dtypes", default=",".join(DTYPES), help="formats, with commas between")
    options.add_argument("--page", type=Path, help=f"where the page is written; all rows: docs/{PAGE.name}")
    options.add_argument("--patience", type=float, default=180.0, help="seconds for a row")
    given = options.parse_args()
    dtypes = given.dtypes.split(",")
    if unknown := [*(set(given.names) - set(names())), *(set(dtypes) - set(DTYPES))]:
        options.error(f"no such row or format: {', '.join(sorted(unknown))}")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rows = []
    for found in measured(given.names or names(), dtypes, given.patience):
        print(line(found), flush=True)
        rows.append(found)
    print(counts(rows))
    where = given.page or (None if given.names or set(dtypes) != set(DTYPES) else PAGE)
    if where is not None:
        where.write_text(page(rows), encoding="utf-8")
    return int(any(found.fails for found in rows))


if __name__ == "__main__":
    sys.exit(main())
