"""Entries: exponential Runge-Kutta methods, several evaluations a step."""

from jaxdiff.solvers.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
