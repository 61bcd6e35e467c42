"""Dense prediction by a guiding code (UViM): the model and its tasks, depth, panoptic segmentation and colorization."""
