"""Figures, drawn from the tables of report/tables.py: a file per kind; `style` is shared."""
