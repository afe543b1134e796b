"""Both training stages on `transformers.Trainer`: losses, what is trained, the loop, resume after a kill."""
