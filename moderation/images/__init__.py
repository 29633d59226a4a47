"""Judging images: decoding, classifiers, faces, known images."""
