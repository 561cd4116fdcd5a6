"""Fill the table of knobs in search_spaces/README.md from the schema, as `spaces knobs` shows it.

python tools/knobs.py    # `make docs`
"""

from __future__ import annotations

from pathlib import Path

from tune_cifar.space.overview import COLUMNS, list_knobs

PAGE = Path(__file__).resolve().parent.parent / "search_spaces" / "README.md"
BEGIN, END = "<!-- knobs:begin -->\n", "<!-- knobs:end -->"


def render_table() -> str:
    """Render the knobs as a Markdown table, one row per knob."""
    rows = [COLUMNS, ["---"] * len(COLUMNS)]
    rows += [(f"`{name}`", *cells) for name, *cells in (knob.row for knob in list_knobs())]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def fill(page: str) -> str:
    """Return the page with the current table between its markers."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{render_table()}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
