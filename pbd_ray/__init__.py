"""pbd_ray: make temporal action detectors shallower without losing accuracy, on Ray."""

__version__ = "0.1.0"
