"""Where the repository is, for tests that read it."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("messages", "bus", "actors", "adapters")
"""The floors that are folders, from the lowest up."""
