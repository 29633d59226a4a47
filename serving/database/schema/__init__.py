"""The tables of the job database, and how an older database is brought to them."""
