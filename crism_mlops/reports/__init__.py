"""Studies and runs for people: figures, reports, tables, the live view."""
