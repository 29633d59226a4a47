"""One generator replica: leases in, checked and stored images out."""
