"""Layers: the only place that holds parameters."""
