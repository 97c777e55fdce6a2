"""Annotations, videos, windows, augmentation: from files to batches."""
