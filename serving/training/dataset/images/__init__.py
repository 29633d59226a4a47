"""One picture: decoded, cropped to a bucket, compared with others."""
