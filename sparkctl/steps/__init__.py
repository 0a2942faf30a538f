"""One module a command: what it reads from the manifest, whom it calls, what it writes back."""
