"""One address that outlives the replicas behind it: HAProxy, and behind it the rescue tier."""
