"""The zoo's nets, one family a file; `robustkit.models.zoo.catalog` names them."""
