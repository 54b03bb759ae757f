"""The NATS bus, which connects the actors of several processes."""
