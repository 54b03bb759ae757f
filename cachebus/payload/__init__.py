"""Conversion between values and payloads: serializers, compression, signatures and encryption."""
