"""How results are shown: statistics over seeds, tables in several formats, the style of figures."""
