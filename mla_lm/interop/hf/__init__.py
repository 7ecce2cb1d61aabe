"""Models as `transformers` has them, folders of safetensors and JSON: written and read without that library."""
