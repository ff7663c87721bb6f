"""Entries: methods with momentum, and bi-directional ones."""

from jaxdiff.solvers.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
