"""Message bytes of every kind and wire version, kept for ever. `write.py` adds what is missing."""
