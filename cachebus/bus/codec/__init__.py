"""Wire codec: encodes messages to bytes and decodes them."""
