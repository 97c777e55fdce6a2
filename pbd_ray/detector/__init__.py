"""The detector: a VideoMAE backbone under an ActionFormer head, its losses, its files."""
