"""The checks of `kvlatent eval`, beside perplexity."""
