"""Scenes become samples."""
