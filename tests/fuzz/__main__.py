"""python -m tests.fuzz --configurations 2000 --rows 2000 --seed 0: generated bad input; status 1 if any failed."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from huggingface_hub import constants

from tests.fuzz.configurations import configurations
from tests.fuzz.rows import rows
from tests.fuzz.trial import closing, count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configurations", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.disable(logging.WARNING)
    constants.HF_HUB_OFFLINE = True  # or it asks for names that are none again and again
    total: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # paths of the generated values are relative
        for make, number in ((configurations, given.configurations), (rows, given.rows)):
            where = Path(folder) / make.__name__
            where.mkdir()
            outcomes, _ = count(make(number, given.seed, where), lambda line: print(line, flush=True))
            print(f"{make.__name__}: {closing(outcomes)}", flush=True)
            total += outcomes
        os.chdir("/")
    print(closing(total))
    return int(total["failed"] > 0)


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    sys.exit(main())
