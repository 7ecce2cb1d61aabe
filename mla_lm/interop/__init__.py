"""Conversion of models: to and from transformers' format, and from other kinds of attention to MLA."""
