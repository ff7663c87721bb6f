"""Entries: Adams methods in any clock, pseudo-numerical methods."""

from jaxdiff.solvers.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
