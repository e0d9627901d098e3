"""Serving: what stands between the network and an engine."""
