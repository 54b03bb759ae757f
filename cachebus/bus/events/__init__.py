"""Emitting events, and subscribing to them."""
