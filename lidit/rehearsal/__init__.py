"""`lidit rehearse`: the whole life of a recipe, in small, before anyone pays for a GPU.

rehearse.py: the verb    stages.py, whole.py: what is played, the first run by itself    shared.py: what they share
play.py: starts commands as a few processes
small.py: the recipe with small sizes    tiny.py: frozen models of the same classes with small sizes
data.py: drawn pictures as shards    witness.py: a callback that notes what a run does
"""
