"""Files as the archive publishes them."""
