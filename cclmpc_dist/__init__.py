"""Semi-supervised segmentation with CCL-MPC: shards, training on one process or many, evaluation, report."""

__version__ = "0.1.0"
