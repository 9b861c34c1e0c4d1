"""The networks: frozen prompt readers, refiners, and the diffusion transformer."""
