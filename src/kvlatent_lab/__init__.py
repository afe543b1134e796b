"""For researchers: studies that redo the paper's tables, and the page that shows all results."""
