"""Which job runs next, and on which replica."""
