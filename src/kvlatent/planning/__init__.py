"""A budget to widths."""
