"""One file per table, figure or miniature part, with its configs and results."""
