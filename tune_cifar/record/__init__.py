"""The record of a search on disk: the source of truth; everything else is a view of it."""
