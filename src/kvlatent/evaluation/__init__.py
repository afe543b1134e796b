"""What a model is worth: perplexity and cache bytes beside its original, and what perplexity alone does not show."""
