"""The zoo's nets, one family a file; `robustkit.models.catalog` names them."""
