"""One generator replica: leases in, judged and stored images out."""
