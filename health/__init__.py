"""What works: probes, findings and verdicts about one node. May import inventory only."""
