"""One kind of adapted layer per file."""
