"""What a trained model is used for: text, and figures of its quality."""
