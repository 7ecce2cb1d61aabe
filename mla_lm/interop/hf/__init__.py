"""Models in the format of `transformers`, folders of safetensors and JSON, written and read without that library."""
