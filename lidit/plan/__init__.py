"""`lidit plan`: what a recipe costs, before it is run.

plan.py: the verb    costs.py: what is counted of a recipe    memory.py: what a GPU holds
hours.py: time and price    disk.py: checkpoints and caches
operations.py: how many operations a model takes, counted by running it without memory
activations.py: what autograd saves    encoding.py: what the VAE and the noise take    live.py: tensors that are there
"""
