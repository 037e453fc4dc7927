"""Other libraries' models and weights. Each module imports its library itself; nothing here is imported by default."""
