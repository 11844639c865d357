"""Diagnoses that raise flags: reasons why the number of a run may not be what it seems.

Each looks at one model and one first batch, keeps nothing for the next, and leaves model and generators as they
were. An honest net raises none.
"""
