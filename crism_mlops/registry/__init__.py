"""Promotion and the served model."""

# The registered model that promotions are of, and that serve and predict take unless they are told.
MODEL_NAME = "crism-instruct-pix2pix"
CHAMPION_URI = f"models:/{MODEL_NAME}@champion"
