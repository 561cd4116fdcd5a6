"""Draw README's picture, docs/asha.png: the early stopping of a recorded search, as in its report.

python tools/picture.py NAME [--storage DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from tune_cifar.record.journal import read_state
from tune_cifar.record.store import find_storage, search_folder
from tune_cifar.report.plots.search import draw_asha
from tune_cifar.report.plots.style import save
from tune_cifar.report.tables import make_rung_scores, make_rungs

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "asha.png"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("--storage", help="the run store")
    arguments = parser.parse_args()
    state = read_state(search_folder(find_storage(arguments.storage), arguments.name))
    header = state.header
    title = f"{header.name}: {header.space}, tier {header.tier}, {header.data.name}"
    save(draw_asha(make_rung_scores(state), make_rungs(state), title), PICTURE)


if __name__ == "__main__":
    main()
