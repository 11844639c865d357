"""Diagnoses that raise flags: reasons why the result of a run may be unreliable.

Each evaluates one model on a first batch, keeps no state, and restores the model and the random generators. A net
without masked gradients raises none.
"""
