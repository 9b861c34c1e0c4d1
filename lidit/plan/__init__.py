"""`lidit plan`: what a recipe costs, before it is run.

plan.py: the verb    costs.py: memory and operations of a recipe    activations.py: what autograd saves
operations.py: how many operations a model takes, counted by running it without memory
"""
