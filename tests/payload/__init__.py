"""The payload pipeline."""
