"""crism-mlops: experiment tracking and hyperparameter sweeps for CRISM mineralogy prediction."""

__version__ = "0.1.0"
