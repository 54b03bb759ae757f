"""Tests of the house itself: imports, layout, packaging, documents."""
