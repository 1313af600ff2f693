"""The ExVideo method on plain tensors: positions, convolution, extension files."""
