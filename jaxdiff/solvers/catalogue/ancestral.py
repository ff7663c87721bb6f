"""Entries: ancestral samplers, several of them from k-diffusion."""

from jaxdiff.solvers.catalogue.entry import Entry

ENTRIES: tuple[Entry, ...] = ()
