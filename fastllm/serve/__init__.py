"""Serving over HTTP. This package imports nothing of an extra; its modules do where they need it."""
