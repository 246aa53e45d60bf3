"""Promotion and the served model."""
