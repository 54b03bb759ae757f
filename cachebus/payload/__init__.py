"""Values to payloads and back: serializers, compression, signatures and encryption."""
