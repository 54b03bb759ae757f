"""Serializers, which convert values to bytes and back."""
