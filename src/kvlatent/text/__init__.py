"""Text to blocks of tokens: documents, tokens, packing, and which part of a text is for what."""
