"""Where models come from and go to: loading with its checks, saving whole or not at all, the card."""
