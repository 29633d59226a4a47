"""The job database: one repository for each kind of record, over one connection pool."""
