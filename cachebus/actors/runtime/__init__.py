"""The runtime of actors: mailboxes, turns and supervision."""
