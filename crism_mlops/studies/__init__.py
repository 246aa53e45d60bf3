"""Optuna studies: one trial, many trials."""
