"""Who runs a latent model: what each engine takes, and what the widths are worth there."""
