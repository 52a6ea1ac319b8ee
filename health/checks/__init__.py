"""Checks: pure functions from evidence to findings, one table for each kind of evidence."""
