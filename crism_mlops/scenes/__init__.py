"""One observation becomes one Scene."""
