"""A detector for other programs: one module a layout, each of which writes files and reads them again."""
