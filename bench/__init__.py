"""`make bench`: ours beside others, on the same servers, in turn. Real processes; nothing here is product."""
