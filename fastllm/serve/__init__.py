"""Serving over HTTP. Importing this package imports nothing of an extra; its modules do, as they need it."""
