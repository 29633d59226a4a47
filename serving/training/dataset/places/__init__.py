"""Places beside folders that a data set lies in: archives, buckets."""
