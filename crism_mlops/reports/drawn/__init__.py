"""The drawings of a study, each on its own; reports/figures.py puts them together."""
