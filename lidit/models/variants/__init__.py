"""How other systems feed an LLM to a diffusion transformer, built on the paper's classes."""
