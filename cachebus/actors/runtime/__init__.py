"""The actor runtime: mailboxes, turns and supervision."""
