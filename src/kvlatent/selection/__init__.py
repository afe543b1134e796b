"""What a text says of a model, and which channels stay."""
