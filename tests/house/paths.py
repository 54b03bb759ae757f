"""Paths of the repository."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("messages", "bus", "actors", "adapters")
"""Floors with a link at the repository's root, from the lowest up."""
