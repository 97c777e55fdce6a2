"""The shipped recipes, one YAML file each (`pbd_ray.config.load_recipe`)."""
