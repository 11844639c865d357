"""The model as attacks see it: counted, cast, folded, stacked, drawn."""
