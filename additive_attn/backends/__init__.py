"""Implementations of the operators; they do not import each other."""
