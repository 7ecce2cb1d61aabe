"""What a person sees: messages, tables, texts side by side."""
