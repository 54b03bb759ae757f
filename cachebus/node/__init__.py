"""The bus, the supervisor and the actors of one process."""
