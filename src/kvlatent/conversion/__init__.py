"""Narrow weights: in closed form, aligned layer by layer, refitted."""
