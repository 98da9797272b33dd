"""The operators as Triton kernels. Imported only where a GPU, or a test, asks for them."""
