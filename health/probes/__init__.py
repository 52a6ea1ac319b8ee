"""Probes: each reads one kind of thing on this node and returns evidence. They judge nothing."""
