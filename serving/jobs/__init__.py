"""Jobs as values: records, states, leases, recipes, results, events."""
