"""Entries: classical Runge-Kutta methods in any clock."""

from jaxdiff.solvers.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
