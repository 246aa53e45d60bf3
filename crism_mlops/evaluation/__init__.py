"""Scores, panels and the prediction path they share."""
