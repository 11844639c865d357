"""Multi-resolution self-ensembles (Fort & Lakshminarayanan 2024, arXiv:2408.05446)."""
