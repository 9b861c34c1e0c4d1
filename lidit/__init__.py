"""lidit: LLM-infused diffusion transformers, one code path at two scales."""
