"""Plain PyTorch, on any device: small calls as a whole, and the operators in blocks."""
