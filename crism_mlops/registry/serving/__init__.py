"""`crism-mlops serve`: a front that guards and forwards, and worker processes that predict."""
