"""Checking images: decoding, classifiers, face detection, lists of known images."""
