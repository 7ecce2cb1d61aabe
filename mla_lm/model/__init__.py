"""The network: a decoder-only transformer, its loss, and its size."""
