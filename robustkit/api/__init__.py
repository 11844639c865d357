"""The verbs as Python functions, one file each; `robustkit` exports them. Imports no torch by itself."""
