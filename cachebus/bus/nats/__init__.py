"""The bus between processes, over NATS."""
