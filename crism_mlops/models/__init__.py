"""Models, floors and their checkpoints."""
