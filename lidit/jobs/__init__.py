"""Commands as jobs: launched here or by Slurm, told to stop, and what became of them."""
