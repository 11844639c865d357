"""The interface of attacks: iterative attacks (`RowWise`), techniques and their compositions, surrogates."""

from robustkit.attack_api.composition import Composition, Technique, ascend, compose
from robustkit.attack_api.oracles import (
    Oracle,
    OracleWrapper,
    SurrogateOracle,
    TransformedOracle,
    per_pixel,
    random_neighbour,
    shared_rng,
    split_rng,
)
from robustkit.attack_api.row_wise import LoopOptions, RowWise, query, query_rows, rank
from robustkit.attack_api.rows import Answer, Model, Rows, State
from robustkit.attack_api.surrogates import Surrogates, Weights, mean_normalised

__all__ = [
    "Answer",
    "Composition",
    "LoopOptions",
    "Model",
    "Oracle",
    "OracleWrapper",
    "RowWise",
    "Rows",
    "State",
    "SurrogateOracle",
    "Surrogates",
    "Technique",
    "TransformedOracle",
    "Weights",
    "ascend",
    "compose",
    "mean_normalised",
    "per_pixel",
    "query",
    "query_rows",
    "random_neighbour",
    "rank",
    "shared_rng",
    "split_rng",
]
