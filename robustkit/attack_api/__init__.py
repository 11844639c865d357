"""The interface of attacks: iterative attacks (`RowWise`), compositions of techniques, and surrogates."""

from robustkit.attack_api.queries import query, query_rows, rank
from robustkit.attack_api.row_wise import LoopOptions, RowWise
from robustkit.attack_api.rows import Answer, Model, Rows, State

__all__ = ["Answer", "LoopOptions", "Model", "RowWise", "Rows", "State", "query", "query_rows", "rank"]
