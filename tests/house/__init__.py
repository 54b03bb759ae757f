"""Tests of the project itself: imports, layout, packaging, documents."""
