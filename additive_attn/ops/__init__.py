"""Checks, derivatives and dispatch of the operators."""
