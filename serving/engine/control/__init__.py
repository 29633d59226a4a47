"""Control branches: pictures that follow edges, depth, segmentation or pose of a given map."""
