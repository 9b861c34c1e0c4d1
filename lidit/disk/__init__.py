"""What lies on disk: the names in a run's folder, and files that are written whole or not at all."""
