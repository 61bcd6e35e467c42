"""Drawing from a loaded prior: the samples of a seed, edits of an image, scores for rejection sampling. No folders."""
