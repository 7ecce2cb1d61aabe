"""Using a trained model: generating text, and measuring its quality."""
